// Compiles our CUDA sources with g++, unchanged, and runs them on a CPU to test them. cuda/device.cuh includes it
// wherever nvcc is not the compiler.
//
// Every CUDA thread becomes a fiber that runs until its next barrier or warp operation, all on one thread of the system:
// a run is deterministic. loader.py compiles in one of three modes:
//   plain  fast. Poisoned memory, canaries, deadlocks and illegal launches are found.
//   asan   -fsanitize=address,bounds: out-of-bounds accesses end the process with a stack trace.
//   check  -fsanitize=thread makes g++ call a hook at every load and store. The hooks are ours (detector.h), libtsan is
//          not linked: races, reads of unwritten memory and out-of-bounds accesses are found by CUDA's rules.
// One launch at a time. What it cannot show: two blocks at once, speed, the last bit of __expf and __fdividef.
#pragma once
#define CUDA_EXPORT extern "C" __attribute__((visibility("default")))

// ---- 1. the C++ library, included before CUDA's keywords become macros -----------------------------------------
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define EMU_ASAN(statement) statement
#else
#define EMU_ASAN(statement)
#endif
#define EMU_RAW __attribute__((no_sanitize("thread"), noinline))  // emulator code: not checked by itself
#define EMU_HIDDEN __attribute__((visibility("hidden")))          // ours, though the process has the same name

// ---- 2. vocabulary --------------------------------------------------------------------------------------------
// __shared__ as thread_local serves in templates too. All shared variables then lie in this library's TLS segment;
// loader.py passes their names and offsets and adds a red zone after each. Our kernels use no dynamic shared memory, no
// votes and no atomics, so there are none here.
#define __shared__ thread_local
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
constexpr size_t EMU_REDZONE = 256;
constexpr size_t EMU_STACK = 256 << 10, EMU_THREADS = 1024;   // a thread's stack; its lowest page is a guard
extern "C" { thread_local __attribute__((aligned(1024))) EMU_HIDDEN char emu_origin[1]; }  // offsets count from here

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
using cudaStream_t = void *;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
static uint3 threadIdx, blockIdx;  // set whenever a fiber is resumed
static dim3 blockDim, gridDim;
static const int warpSize = 32;

// ---- 3. arithmetic ----------------------------------------------------------------------------------------------
struct __nv_bfloat16 { uint16_t bits; };  // storage only: kernels compute in float
struct __half { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
inline uint32_t emu_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float emu_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline float __bfloat162float(__nv_bfloat16 h) { return emu_float(uint32_t(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t u = emu_bits(f);
  if (f != f) return {0x7fff};                            // the NaN that the hardware gives
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  if (exponent == 31) return emu_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(mantissa) * 0x1p-24f;
  return emu_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float f) {
  const uint32_t u = emu_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};                    // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000)                                     // below 2^-14: adding 0.5 rounds at bit 2^-24
    return {uint16_t(sign | (emu_bits(emu_float(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13))};
}
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__float2bfloat16_rn(f.x), __float2bfloat16_rn(f.y)}; }
inline __half2 __float22half2_rn(float2 f) { return {__float2half_rn(f.x), __float2half_rn(f.y)}; }
// The fast intrinsics follow the device's definition (2^ of a rounded product; a reciprocal, then a product), so
// their error grows with |x| as on the device; the last bit may differ. Macros, as glibc declares its own __expf.
inline float emu_fast_divide(float x, float y) { return fabsf(y) > 0x1p126f ? x * 0.f : x * (1.f / y); }
#define __expf(x) exp2f((x) * 1.44269504f)
#define __fdividef(x, y) emu_fast_divide(x, y)

// ---- 4. the machine: one block of fibers --------------------------------------------------------------------------
extern "C" EMU_HIDDEN void emu_switch(void **save, void *load);
extern "C" EMU_HIDDEN char __ehdr_start[], _end[];  // this library in memory, from the linker
#if defined(EMU_UCONTEXT) || !defined(__x86_64__)
#include <ucontext.h>
EMU_RAW void emu_switch(void **save, void *load) {  // here a "stack pointer" is the address of a ucontext_t
  if (!*save) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t *>(*save), static_cast<ucontext_t *>(load));
}
#else
asm(R"(.pushsection .text
emu_switch: push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi); mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret
.popsection)");
#endif

namespace emu {
enum State { READY, WAITING, EXITED };
enum Op { BARRIER, SYNC, SHUFFLE };
static const char *const op_name[] = {"__syncthreads", "__syncwarp", "a warp shuffle"};

struct Thread {
  void *sp, *fake_stack;          // fake_stack belongs to ASan
  uint3 index;
  unsigned id, lane, warp, mask;  // mask, op, line: what it waits for
  State state;
  Op op;
  int line, source;               // source: the lane that a shuffle reads
  uint64_t value, result;         // its operand of a warp operation, and the result
  uint32_t seen[32];              // vector clock over its warp; advanced by __syncwarp
};
struct Access { uint32_t block, epoch, clock, pc; uint16_t thread; };  // block 0: none
struct Cell { Access write, read[2]; };
struct Region {                   // a shared variable or a global buffer
  char name[96];
  uintptr_t lo;
  size_t size;
  ptrdiff_t offset;               // shared: distance from emu_origin
  bool shared, filled;            // filled: written by the host
  Cell *cells;                    // the shadow, made when the region is first touched
};

static struct Machine {
  std::vector<Thread> threads;
  std::vector<unsigned> alive, waiting, warps, lanes;  // per warp: bit masks of lanes; the orders to run in
  Region *regions[256], *last = nullptr;               // plain arrays: the hooks must not call instrumented code
  int region_count = 0;
  Thread *current = nullptr;                           // null: host code runs
  void *sp = nullptr, *fake_stack = nullptr;           // the host's
  const void *host_stack = nullptr;
  size_t host_stack_size = 0;
  char *stacks = nullptr;
  unsigned lane = 0, live = 0, arrived = 0, block = 0, first_block = 1, epoch = 1;  // blocks: numbered over all launches
  bool in_block = false;
  int schedule = 0;                                    // 0 forward, 1 reverse, 2 random
  uint64_t random = 1, steps = 0, accesses = 0;
  uint64_t last_blocks = ~uint64_t(0);                 // only the last so many blocks of a grid run
  void (*kernel)() = nullptr;
  char launch[256] = "", error[2048] = "";
} M;

EMU_RAW static void to_host() {
  Thread &t = *M.current;
  EMU_ASAN(__sanitizer_start_switch_fiber(t.state == EXITED ? nullptr : &t.fake_stack, M.host_stack, M.host_stack_size));
  emu_switch(&t.sp, M.sp);
  EMU_ASAN(__sanitizer_finish_switch_fiber(t.fake_stack, &M.host_stack, &M.host_stack_size));
}
EMU_RAW static void resume(Thread &t) {
  M.current = &t, M.lane = t.lane, threadIdx = t.index, ++M.steps;
  EMU_ASAN(__sanitizer_start_switch_fiber(&M.fake_stack, M.stacks + t.id * EMU_STACK, EMU_STACK));
  emu_switch(&M.sp, t.sp);
  EMU_ASAN(__sanitizer_finish_switch_fiber(M.fake_stack, nullptr, nullptr));
  M.current = nullptr;
}
// The first error ends the launch; a fiber that fails is never resumed.
template <class... V> EMU_RAW static void fail(const char *format, V... values) {
  if (M.error[0]) return;
  auto add = [](const char *format, auto... values) {
    const size_t n = strlen(M.error);
    snprintf(M.error + n, sizeof M.error - n, format, values...);
  };
  add("%s", M.launch);
  if (M.in_block) add(", block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (M.current) add(", thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
  add("%s", ": "), add(format, values...);
  if (M.current) M.current->state = EXITED, to_host();
}
static void deadlock() {
  std::map<std::string, std::vector<const Thread *>> groups;
  for (const Thread &t : M.threads) {
    char what[96] = "have exited";
    if (t.state != EXITED) snprintf(what, sizeof what, "wait in %s at line %d, mask %08x", op_name[t.op], t.line, t.mask);
    groups[what].push_back(&t);
  }
  std::string text = "deadlock";
  for (const auto &[what, who] : groups) {
    char first[64];
    snprintf(first, sizeof first, ", the first is (%u,%u,%u)", who[0]->index.x, who[0]->index.y, who[0]->index.z);
    text += "\n  " + std::to_string(who.size()) + " threads " + what + first;
  }
  fail("%s", text.c_str());
}

#define EMU_EACH(lane, set) (unsigned rest = (set), lane; rest && (lane = __builtin_ctz(rest), true); rest &= rest - 1)
// Resumes a group of lanes once all of them that still run have reached the same operation.
EMU_RAW static void release_warp(const Thread &first) {
  Thread *lanes = &M.threads[first.warp * 32];
  const unsigned need = first.mask & M.alive[first.warp];
  uint32_t joined[32] = {};
  if ((M.waiting[first.warp] & need) != need) return;
  for EMU_EACH(i, need) {
    if (lanes[i].mask != first.mask || lanes[i].op != first.op || lanes[i].line != first.line) return;
    for (int j = 0; j < 32 && first.op == SYNC; ++j) joined[j] = joined[j] > lanes[i].seen[j] ? joined[j] : lanes[i].seen[j];
  }
  M.waiting[first.warp] &= ~need;
  for EMU_EACH(i, need) {
    Thread &t = lanes[i];
    t.state = READY;
    if (t.op == SHUFFLE)  // a lane that does not take part gives an undefined value: NaN here
      t.result = need >> t.source & 1 ? lanes[t.source].value : ~uint64_t(0);
    if (t.op == SYNC) memcpy(t.seen, joined, sizeof joined), ++t.seen[i];  // only __syncwarp orders memory
  }
}
EMU_RAW static uint64_t warp_op(Op op, unsigned mask, uint64_t value, int source, int line) {
  Thread &t = *M.current;
  if (!(mask >> t.lane & 1)) fail("%s at line %d: lane %u is not in its own mask %08x", op_name[op], line, t.lane, mask);
  t.state = WAITING, t.op = op, t.mask = mask, t.value = value, t.source = source, t.line = line;
  M.waiting[t.warp] |= 1u << t.lane;
  release_warp(t);
  to_host();
  return t.result;
}
EMU_RAW static void block_barrier(int line) {
  Thread &t = *M.current;
  t.state = WAITING, t.op = BARRIER, t.mask = 0, t.line = line;
  if (++M.arrived == M.threads.size()) {
    for (unsigned i = 0; i < M.arrived; ++i) {
      const Thread &a = M.threads[i];
      if (a.line != line) fail("divergent barrier: line %d here, line %d in thread (%u,%u,%u)", line, a.line, a.index.x, a.index.y, a.index.z);
      M.threads[i].state = READY;
    }
    M.arrived = 0, ++M.epoch;
  }
  to_host();
}
EMU_RAW static void fiber_main() {
  EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &M.host_stack, &M.host_stack_size));
  M.kernel();
  Thread &t = *M.current;
  t.state = EXITED, --M.live, M.alive[t.warp] &= ~(1u << t.lane);
  for EMU_EACH(lane, M.waiting[t.warp]) release_warp(M.threads[t.warp * 32 + lane]);  // they may have waited for it
  to_host();
}
EMU_RAW static void prepare(Thread &t, unsigned id) {
  char *stack = M.stacks + id * EMU_STACK;
  t.id = id, t.lane = id % 32, t.warp = id / 32, t.state = READY, t.fake_stack = nullptr;
  t.index = {id % blockDim.x, id / blockDim.x % blockDim.y, id / (blockDim.x * blockDim.y)};
  memset(t.seen, 0, sizeof t.seen), t.seen[t.lane] = 1;
  M.alive[t.warp] |= 1u << t.lane;
#if defined(EMU_UCONTEXT) || !defined(__x86_64__)
  auto *context = static_cast<ucontext_t *>(t.sp ? t.sp : t.sp = new ucontext_t);
  getcontext(context);
  context->uc_stack.ss_sp = stack, context->uc_stack.ss_size = EMU_STACK, context->uc_link = nullptr;
  makecontext(context, fiber_main, 0);
#else  // six registers, the address that `ret` takes, a zero above it for alignment
  void **top = reinterpret_cast<void **>(stack + EMU_STACK);
  top[-1] = nullptr, top[-2] = reinterpret_cast<void *>(fiber_main), t.sp = top - 8;
#endif
}
static uint64_t draw(uint64_t below) {  // xorshift
  M.random ^= M.random << 13, M.random ^= M.random >> 7, M.random ^= M.random << 17;
  return M.random % below;
}
static void rearrange(std::vector<unsigned> &order) {
  for (size_t i = order.size(); i > 1 && M.schedule == 2; --i) std::swap(order[i - 1], order[draw(i)]);
}
static std::vector<unsigned> first_order(unsigned n) {
  std::vector<unsigned> order;
  for (unsigned i = 0; i < n; ++i) order.push_back(M.schedule == 1 ? n - 1 - i : i);
  rearrange(order);
  return order;
}
static void check_canaries(bool shared) {  // ASan does this itself, and would object to our looking
#ifndef __SANITIZE_ADDRESS__
  for (int i = 0; i < M.region_count; ++i) {
    const Region &r = *M.regions[i];
    for (size_t k = 0; r.shared == shared && k < EMU_REDZONE; ++k)
      if (reinterpret_cast<unsigned char *>(r.lo)[r.size + k] != 0xff)
        return fail("out of bounds: a write %zu bytes past the end of %s (%zu bytes)", k, r.name, r.size);
  }
#endif
}
// A warp runs as far as it can before the next one does; at random, a few steps at a time.
static void run_block(size_t number) {
  blockIdx = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y), unsigned(number / gridDim.x / gridDim.y)};
  M.in_block = true, ++M.block, M.epoch = 1, M.arrived = 0, M.live = M.threads.size();
  for (int i = 0; i < M.region_count; ++i)  // 0xff... is NaN in every float format
    if (M.regions[i]->shared) memset(reinterpret_cast<void *>(M.regions[i]->lo), 0xff, M.regions[i]->size);
  const size_t warps = (M.threads.size() + 31) / 32;
  M.alive.assign(warps, 0), M.waiting.assign(warps, 0), M.warps = first_order(warps), M.lanes = first_order(32);
  for (unsigned i = 0; i < M.threads.size(); ++i) prepare(M.threads[i], i);
  while (M.live && !M.error[0]) {
    const uint64_t before = M.steps;
    for (unsigned warp : M.warps) {
      uint64_t rounds = M.schedule == 2 ? 1 + draw(8) : ~uint64_t(0), last;
      do {
        last = M.steps;
        for (unsigned lane : M.lanes)
          if (const unsigned i = warp * 32 + lane; i < M.threads.size() && M.threads[i].state == READY && !M.error[0]) resume(M.threads[i]);
        rearrange(M.lanes);
      } while (M.steps != last && --rounds);
    }
    if (M.steps == before) deadlock();
    rearrange(M.warps);
  }
  if (!M.error[0]) check_canaries(true);
  M.in_block = false;
}
static void run_grid(dim3 grid, dim3 block) {
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > EMU_THREADS || block.z > 64) return fail("bad launch: a block of %u x %u x %u", block.x, block.y, block.z);
  if (!blocks || grid.y > 65535 || grid.z > 65535) return fail("bad launch: a grid of %u x %u x %u", grid.x, grid.y, grid.z);
  gridDim = grid, blockDim = block, M.first_block = M.block + 1, M.threads.resize(threads);
  if (!M.stacks) {
    M.stacks = static_cast<char *>(mmap(nullptr, EMU_THREADS * EMU_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < EMU_THREADS; ++i) mprotect(M.stacks + i * EMU_STACK, 4096, PROT_NONE);
  }
  for (int i = 0; i < M.region_count; ++i) {
    Region &r = *M.regions[i];
    if (!r.shared) continue;
    char *start = emu_origin + r.offset;  // of this OS thread
    r.lo = reinterpret_cast<uintptr_t>(start);
    EMU_ASAN(__asan_unpoison_memory_region(start, r.size + EMU_REDZONE));
    memset(start, 0xff, r.size + EMU_REDZONE);
    EMU_ASAN(__asan_poison_memory_region(start + r.size, EMU_REDZONE));
  }
  const size_t few = std::min<size_t>(blocks, M.last_blocks);
  for (unsigned number : first_order(few))
    if (!M.error[0]) run_block(blocks - few + number);
  if (!M.error[0]) check_canaries(false);
  EMU_ASAN(if (M.error[0]) __asan_unpoison_memory_region(M.stacks, EMU_THREADS * EMU_STACK));  // abandoned frames
}
template <class... P>
void launch(const char *name, const char *file, int line, void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t,
            std::remove_const_t<P>... arguments) {
  static std::optional<std::tuple<std::remove_const_t<P>...>> held;  // static, as a lambda without captures is all that a fiber can call
  static void (*function)(P...);
  if (M.error[0]) return;  // as on the device, nothing runs after an error until the host has asked for it
  held.emplace(arguments...), function = kernel;
  snprintf(M.launch, sizeof M.launch, "%s (launched at %s:%d)", name, strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line);
  M.kernel = [] { std::apply(function, *held); };
  run_grid(grid, block);
}
static void add_region(const char *name, bool shared, ptrdiff_t offset, size_t size, void *memory) {
  if (M.region_count == 256) abort();
  Region *r = new Region{{}, reinterpret_cast<uintptr_t>(memory), size, offset, shared, false, nullptr};
  snprintf(r->name, sizeof r->name, "%s", name);
  M.regions[M.region_count++] = r;
}
}  // namespace emu

// ---- 5. in the mode "check" detector.h looks at every load and store ----------------------------------------
#ifdef __SANITIZE_THREAD__
#include "detector.h"
#else
#define EMU_NOTE(p, n, kind) (void)0
#endif

// ---- 6. what kernels call ----------------------------------------------------------------------------------
#define CUDA_LAUNCH(kernel, grid, block, stream, ...) \
  emu::launch(#kernel, __FILE__, __LINE__, kernel, grid, block, stream, ##__VA_ARGS__)
#define EMU_LINE int line = __builtin_LINE()  // as a default argument: the caller's line
inline void __syncthreads(EMU_LINE) { emu::block_barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) { emu::warp_op(emu::SYNC, mask, 0, 0, line); }
template <class T> T emu_shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t raw = 0;
  memcpy(&raw, &value, sizeof value);
  raw = emu::warp_op(emu::SHUFFLE, mask, raw, source, line);
  memcpy(&value, &raw, sizeof value);
  return value;
}
#define EMU_SHUFFLE(name, argument, from)                                                                    \
  template <class T> T name(unsigned mask, T v, int argument, int width = 32, EMU_LINE) {                    \
    const int me = emu::M.lane, first = me & -width, last = me | (width - 1), lane = from;                   \
    return emu_shuffle(mask, v, lane < first || lane > last ? me : lane, line); /* outside: one's own value */ \
  }
EMU_SHUFFLE(__shfl_sync, source, first + (source & (width - 1)))
EMU_SHUFFLE(__shfl_up_sync, delta, me - delta)

// ---- 7. what the host calls: the little of CUDA's runtime that launchers need, and loader.py's side ---------
inline cudaError_t cudaGetLastError() { return emu::M.error[0] ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return emu::M.error; }
CUDA_EXPORT void emu_configure(int schedule, uint64_t seed) { emu::M.schedule = schedule, emu::M.random = seed * 2 + 1; }
CUDA_EXPORT void emu_last_blocks(uint64_t n) { emu::M.last_blocks = n; }
CUDA_EXPORT const char *emu_error() { return emu::M.error; }
CUDA_EXPORT void emu_forget() { emu::M.error[0] = 0; }
CUDA_EXPORT void emu_counts(uint64_t *two) { two[0] = emu::M.steps, two[1] = emu::M.accesses; }
CUDA_EXPORT void emu_shared_variable(const char *name, ptrdiff_t offset, size_t size) { emu::add_region(name, true, offset, size, nullptr); }
CUDA_EXPORT void *emu_malloc(const char *name, size_t size, const void *content) {  // content null: unwritten
  const size_t whole = (size + 2 * EMU_REDZONE + 255) / 256 * 256;
  char *base = static_cast<char *>(aligned_alloc(256, whole)), *memory = base + EMU_REDZONE;
  memset(base, 0xff, whole);
  if (content) memcpy(memory, content, size);
  EMU_ASAN(__asan_poison_memory_region(base, EMU_REDZONE));
  EMU_ASAN(__asan_poison_memory_region(memory + size, whole - EMU_REDZONE - size));
  emu::add_region(name, false, -1, size, memory);
  emu::M.regions[emu::M.region_count - 1]->filled = content != nullptr;
  return memory;
}
CUDA_EXPORT void emu_free(void *memory) {
  int i = 0;
  while (emu::M.regions[i]->shared || emu::M.regions[i]->lo != reinterpret_cast<uintptr_t>(memory)) ++i;
  emu::Region *r = emu::M.regions[i];
  char *base = static_cast<char *>(memory) - EMU_REDZONE;
  EMU_ASAN(__asan_unpoison_memory_region(base, r->size + 2 * EMU_REDZONE));
  emu::M.regions[i] = emu::M.regions[--emu::M.region_count], emu::M.last = nullptr;
  free(base), free(r->cells), delete r;
}
