// The race, bounds and unwritten-memory detector; part of emulator.h, in the mode "check" only.
//
// g++ -fsanitize=thread puts a call before every load and store. We define the called functions ourselves and keep,
// for every EMU_GRAIN bytes of shared memory and of emu_malloc's buffers, the last write and two reads after it.
// Happens-before: within a thread; from before to after a __syncthreads in a block; from before to after a
// __syncwarp among its lanes; from one launch to the next. Shuffles order nothing, as on the device.
#pragma once
#ifndef EMU_GRAIN
#define EMU_GRAIN 2  // bytes per shadow cell; 1 if neighbouring threads store single bytes
#endif
namespace emu {
enum Kind { READ, WRITE };
// Did that access happen before this moment of the running thread? Blocks of one launch are never ordered.
EMU_RAW static bool ordered(const Access &a) {
  if (a.block != M.block) return a.block < M.first_block;
  const Thread &t = *M.current;
  return a.thread == t.id || a.epoch < M.epoch || (a.thread / 32 == t.warp && a.clock <= t.seen[a.thread % 32]);
}
EMU_RAW static void compare(const Region &r, size_t byte, const Access &now, const char *what, const Access &old, const char *did) {
  if (!old.block || ordered(old)) return;
  const uint3 &i = M.threads[old.thread].index;
  fail("race: %s %s at byte %zu at [pc 0x%x], which thread (%u,%u,%u) of %s %s at [pc 0x%x], with no barrier between", what, r.name,
       byte, now.pc, i.x, i.y, i.z, old.block == M.block ? "this block" : "another block", did, old.pc);
}
EMU_RAW static void note(uintptr_t address, size_t n, Kind kind, void *return_address) {
  const uintptr_t image = reinterpret_cast<uintptr_t>(__ehdr_start);
  if (!M.current || address - reinterpret_cast<uintptr_t>(M.stacks) < EMU_THREADS * EMU_STACK ||
      address - image < size_t(_end - __ehdr_start)) return;  // host code, a thread's own stack, constants
  ++M.accesses;
  Thread &t = *M.current;
  Region *r = M.last;
  const uint32_t pc = uint32_t(reinterpret_cast<uintptr_t>(return_address) - 1 - image);
  for (int i = 0; (!r || address - r->lo >= r->size) && i < M.region_count; ++i) r = M.regions[i];
  if (!r || address - r->lo >= r->size || address - r->lo + n > r->size) {
    const Region *near = nullptr;
    for (int i = 0; i < M.region_count; ++i)
      if (M.regions[i]->lo <= address && (!near || M.regions[i]->lo > near->lo)) near = M.regions[i];
    fail("out of bounds: a %s of %zu bytes at [pc 0x%x] is in no buffer; below it, %s has %zu bytes and this is byte %zu",
         kind ? "write" : "read", n, pc, near ? near->name : "nothing", near ? near->size : 0, near ? address - near->lo : 0);
  }
  M.last = r;
  if (!r->cells) r->cells = static_cast<Cell *>(calloc(r->size / EMU_GRAIN + 1, sizeof(Cell)));
  const Access now = {M.block, M.epoch, t.seen[t.lane], pc, uint16_t(t.id)};
  const size_t byte = address - r->lo;
  for (size_t g = byte / EMU_GRAIN; g <= (byte + n - 1) / EMU_GRAIN; ++g) {
    Cell &c = r->cells[g];
    const bool written = r->filled || (r->shared ? c.write.block == M.block : c.write.block != 0);
    if (kind != WRITE && !written) fail("unwritten: byte %zu of %s is read at [pc 0x%x] before anything was stored there", byte, r->name, pc);
    if (r->shared && c.write.block != M.block) c = Cell();  // a new block finds shared memory blank
    compare(*r, byte, now, kind ? "this thread writes" : "this thread reads", c.write, "wrote");
    if (kind == READ) {  // keep two unordered readers, of two warps if there are
      Access &a = c.read[0], &b = c.read[1];
      if (!a.block || ordered(a)) a = now;
      else if (!b.block || ordered(b) || (b.thread / 32 == a.thread / 32 && t.warp != a.thread / 32u)) b = now;
      continue;
    }
    for (const Access &a : c.read) compare(*r, byte, now, "this thread writes", a, "read");
    c = {now, {}};
  }
}
#define EMU_NOTE(p, n, kind) emu::note(reinterpret_cast<uintptr_t>(p), n, emu::kind, __builtin_return_address(0))
}  // namespace emu

#define EMU_HOOK extern "C" EMU_HIDDEN EMU_RAW void
#define EMU_HOOKS(n)                                             \
  EMU_HOOK __tsan_read##n(void *p) { EMU_NOTE(p, n, READ); }     \
  EMU_HOOK __tsan_write##n(void *p) { EMU_NOTE(p, n, WRITE); }   \
  EMU_HOOK __tsan_unaligned_read##n(void *p) { EMU_NOTE(p, n, READ); } \
  EMU_HOOK __tsan_unaligned_write##n(void *p) { EMU_NOTE(p, n, WRITE); }
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)
EMU_HOOK __tsan_read_range(void *p, size_t n) { EMU_NOTE(p, n, READ); }
EMU_HOOK __tsan_write_range(void *p, size_t n) { EMU_NOTE(p, n, WRITE); }
EMU_HOOK __tsan_init() {}
EMU_HOOK __tsan_func_entry(void *) {}
EMU_HOOK __tsan_func_exit() {}
