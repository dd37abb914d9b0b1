// The element-wise parts of a block on a GPU, each in one pass over memory; elementwise_cpu.cpp has them for CPUs.
#include "device.cuh"

#include "kernels.h"
#include "sum_rows.cuh"

namespace rwkv {
namespace {

constexpr int MIX_LANES = 32, MIX_WARPS = 8, MIX_STEPS = 8, MIX_ROWS = MIX_WARPS * MIX_STEPS;
constexpr int MAX_MIXES = MAX_SUMS, FLAT_THREADS = 256, WIDE = 4;  // WIDE: channels of a thread, backward half

struct ShiftMix {
  int64_t B, T, C, count;
  const void *x, *previous;       // (B, T, C); (B, C) or null
  const float *mix[MAX_MIXES];    // (C) each
  void *out[MAX_MIXES];           // forward
  const void *grad[MAX_MIXES];    // backward: gradients of the outputs
  void *dx, *dprevious;
  float *parts;                   // (B · ceil(T / MIX_ROWS), count, C)
  __host__ __device__ int64_t blocks() const { return (T + MIX_ROWS - 1) / MIX_ROWS; }
};

struct Rows {  // a thread's V channels and MIX_STEPS rows of sequence b, from row t on
  int64_t task, b, c, t;
  int count;
  bool inside;
};

template <int V> __device__ __forceinline__ Rows rows_of(const ShiftMix &a) {
  const int64_t columns = (a.C + MIX_LANES * V - 1) / (MIX_LANES * V), block = blockIdx.x, task = block / columns;
  const int64_t c = block % columns * (MIX_LANES * V) + threadIdx.x * V, b = task / a.blocks();
  const int64_t t = task % a.blocks() * MIX_ROWS + threadIdx.y * MIX_STEPS, left = a.T - t;
  const bool inside = c < a.C;
  return {task, b, c, t, !inside || left < 0 ? 0 : left < MIX_STEPS ? int(left) : MIX_STEPS, inside};
}

// Row t - 1 and the `count` rows from t on.
template <class S, int V> __device__ __forceinline__ void load_rows(const ShiftMix &a, const Rows &at, Pack<S, V> *x) {
  const S *from = static_cast<const S *>(a.x) + (at.b * a.T + at.t) * a.C + at.c;
  if (at.count > 0) {
    if (at.t > 0) x[0] = load<S, V>(from - a.C);
    else if (a.previous) x[0] = load<S, V>(static_cast<const S *>(a.previous) + at.b * a.C + at.c);
  }
#pragma unroll
  for (int j = 0; j < MIX_STEPS; ++j)
    if (j < at.count) x[j + 1] = load<S, V>(from + j * a.C);
}

template <class S, int V> __global__ __launch_bounds__(MIX_LANES * MIX_WARPS) void shift_mix_kernel(const __grid_constant__ ShiftMix a) {
  const Rows at = rows_of<V>(a);
  Pack<S, V> x[MIX_STEPS + 1] = {};
  load_rows<S, V>(a, at, x);
  for (int which = 0; which < a.count; ++which) {
    float mix[V] = {};
    if (at.inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) mix[i] = a.mix[which][at.c + i];
    }
    S *to = static_cast<S *>(a.out[which]) + (at.b * a.T + at.t) * a.C + at.c;
#pragma unroll
    for (int j = 0; j < MIX_STEPS; ++j) {
      if (j < at.count) {
        float old[V], now[V];
        unpack<S, V>(x[j], old), unpack<S, V>(x[j + 1], now);
#pragma unroll
        for (int i = 0; i < V; ++i) now[i] = fmaf(now[i] - old[i], mix[i], old[i]);
        store<S, V>(to + j * a.C, now);
      }
    }
  }
}

template <class S, int V> __global__ __launch_bounds__(MIX_LANES * MIX_WARPS, 2) void shift_mix_backward_kernel(const __grid_constant__ ShiftMix a) {
  __shared__ float part[2][MIX_WARPS][V][MIX_LANES];  // two, in turn: one barrier a mix is enough
  const int lane = threadIdx.x, warp = threadIdx.y;
  const Rows at = rows_of<V>(a);
  const int64_t first = (at.b * a.T + at.t) * a.C + at.c;
  Pack<S, V> x[MIX_STEPS + 1] = {};
  load_rows<S, V>(a, at, x);
  float dx[MIX_STEPS][V] = {}, dprevious[V] = {};
  for (int which = 0; which < a.count; ++which) {
    const S *from = static_cast<const S *>(a.grad[which]) + first;
    float mix[V] = {}, dmix[V] = {};
    if (at.inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) mix[i] = a.mix[which][at.c + i];
    }
    Pack<S, V> g[MIX_STEPS + 1] = {};  // the last: of the next row, whose shift reaches this thread's last row
#pragma unroll
    for (int j = 0; j <= MIX_STEPS; ++j)
      if (j < at.count || (j == at.count && at.count > 0 && at.t + j < a.T)) g[j] = load<S, V>(from + j * a.C);
#pragma unroll
    for (int j = 0; j <= MIX_STEPS; ++j) {
      float gj[V], old[V], now[V];
      unpack<S, V>(g[j], gj), unpack<S, V>(x[j], old), unpack<S, V>(x[j < MIX_STEPS ? j + 1 : j], now);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float direct = gj[i] * mix[i], shifted = gj[i] - direct;
        if (j < at.count) dmix[i] = fmaf(gj[i], now[i] - old[i], dmix[i]);
        if (j < MIX_STEPS) dx[j < MIX_STEPS ? j : 0][i] += direct;
        if (j > 0) dx[j > 0 ? j - 1 : 0][i] += shifted;
        else dprevious[i] += shifted;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) part[which & 1][warp][i][lane] = dmix[i];
    __syncthreads();
    if (warp == 0 && at.inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float sum = 0.f;
        for (int other = 0; other < MIX_WARPS; ++other) sum += part[which & 1][other][i][lane];
        a.parts[(at.task * a.count + which) * a.C + at.c + i] = sum;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < MIX_STEPS; ++j)
    if (j < at.count) store<S, V>(static_cast<S *>(a.dx) + first + j * a.C, dx[j]);
  if (at.t == 0 && at.count > 0) store<S, V>(static_cast<S *>(a.dprevious) + at.b * a.C + at.c, dprevious);
}

// ---- on n elements ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x, float *complement) {  // σ(x) and 1 - σ(x), neither by a difference
  const float e = __expf(-fabsf(x)), s = __fdividef(1.f, 1.f + e);
  *complement = x < 0.f ? s : e * s;
  return x < 0.f ? e * s : s;
}

struct ReluSquared {
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  __device__ static void apply(const float *in, float *out) {
    const float positive = in[0] < 0.f ? 0.f : in[0];  // in this order a NaN stays one
    out[0] = positive * positive;
  }
};

struct ReluSquaredBackward {  // of h and its gradient: k itself is not kept
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  __device__ static void apply(const float *in, float *out) { out[0] = 2.f * sqrtf(in[0]) * in[1]; }
};

struct SigmoidGate {
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  __device__ static void apply(const float *in, float *out) {
    float complement;
    out[0] = sigmoid(in[0], &complement) * in[1];
  }
};

struct SigmoidGateBackward {  // of r, y and the gradient of the output
  static constexpr int INPUTS = 3, OUTPUTS = 2;
  __device__ static void apply(const float *in, float *out) {
    float complement;
    const float s = sigmoid(in[0], &complement);
    out[0] = in[2] * in[1] * (s * complement), out[1] = in[2] * s;
  }
};

struct Flat {
  int64_t n;
  const void *in[3];
  void *out[2];
};

template <class S, class F, int V> __device__ __forceinline__ void flat(const Flat &a, int64_t at) {
  Pack<S, V> raw[F::INPUTS];
  float in[F::INPUTS][V], out[F::OUTPUTS][V];
#pragma unroll
  for (int i = 0; i < F::INPUTS; ++i) raw[i] = load<S, V>(static_cast<const S *>(a.in[i]) + at);
#pragma unroll
  for (int i = 0; i < F::INPUTS; ++i) unpack<S, V>(raw[i], in[i]);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float x[F::INPUTS], y[F::OUTPUTS];
#pragma unroll
    for (int j = 0; j < F::INPUTS; ++j) x[j] = in[j][i];
    F::apply(x, y);
#pragma unroll
    for (int j = 0; j < F::OUTPUTS; ++j) out[j][i] = y[j];
  }
#pragma unroll
  for (int i = 0; i < F::OUTPUTS; ++i) store<S, V>(static_cast<S *>(a.out[i]) + at, out[i]);
}

// V elements of 16 bytes a thread; the last n mod V, or all where a pointer is not aligned, one by one.
template <class S, class F, int V> __global__ __launch_bounds__(FLAT_THREADS) void flat_kernel(const __grid_constant__ Flat a) {
  const int64_t at = (int64_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * V;
  if (at + V <= a.n) {
    flat<S, F, V>(a, at);
  } else {
    for (int64_t i = at; i < a.n; ++i) flat<S, F, 1>(a, i);
  }
}

template <class S, class F, int V> const char *launch_flat(const Flat &a, cudaStream_t stream) {
  const int64_t blocks = (a.n + FLAT_THREADS * V - 1) / (FLAT_THREADS * V);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more elements than a grid has blocks for";
  CUDA_LAUNCH((flat_kernel<S, F, V>), dim3(unsigned(blocks)), dim3(FLAT_THREADS), stream, a);
  return launched();
}

template <class F> const char *on_elements(int storage, const Flat &a, void *stream) {
  return with_storage(storage, [&](auto kind) {
    using S = decltype(kind);
    constexpr int V = 16 / sizeof(S);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const bool aligned_all = aligned<S, V>(V, a.in[0], a.in[1], a.in[2], a.out[0], a.out[1]);  // null pointers are aligned
    return aligned_all ? launch_flat<S, F, V>(a, on) : launch_flat<S, F, 1>(a, on);
  });
}

template <class Body> const char *on_rows(int storage, const ShiftMix &a, int width, const Body &body) {
  if (a.B < 1 || a.T < 1 || a.C < 1 || a.count < 1 || a.count > MAX_MIXES)
    return "shift_mix needs B, T and C of at least 1 and 1 to 8 mixes";
  return with_storage(storage, [&](auto kind) {
    using S = decltype(kind);
    const int64_t columns = (a.C + MIX_LANES * width - 1) / (MIX_LANES * width), blocks = a.B * a.blocks() * columns;
    if (blocks > 0x7fffffff) return "shift_mix: more blocks than a grid has";
    return body(S(), dim3(unsigned(blocks)), dim3(MIX_LANES, MIX_WARPS));
  });
}

// Whether all tensors of a can be read WIDE elements at a time.
bool aligned_all(int storage, const ShiftMix &a) {
  const uintptr_t bytes = WIDE * (storage == 0 ? 4 : 2);
  uintptr_t all = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.previous);
  all |= reinterpret_cast<uintptr_t>(a.dx) | reinterpret_cast<uintptr_t>(a.dprevious);
  for (int i = 0; i < MAX_MIXES; ++i) all |= reinterpret_cast<uintptr_t>(a.out[i]) | reinterpret_cast<uintptr_t>(a.grad[i]);
  return a.C % WIDE == 0 && all % bytes == 0;
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

extern "C" const char *rwkv_shift_mix(int storage, int64_t B, int64_t T, int64_t C, int64_t count, const void *x,
                                      const void *previous, const float *const *mixes, void *const *outputs,
                                      void *stream) {
  ShiftMix a{};
  a.B = B, a.T = T, a.C = C, a.count = count, a.x = x, a.previous = previous;
  for (int i = 0; i < count && i < MAX_MIXES; ++i) a.mix[i] = mixes[i], a.out[i] = outputs[i];
  const bool wide = aligned_all(storage, a);
  return on_rows(storage, a, wide ? WIDE : 1, [&](auto kind, dim3 grid, dim3 block) {
    using S = decltype(kind);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (wide) CUDA_LAUNCH((shift_mix_kernel<S, WIDE>), grid, block, on, a);
    else CUDA_LAUNCH((shift_mix_kernel<S, 1>), grid, block, on, a);
    return launched();
  });
}

extern "C" const char *rwkv_shift_mix_backward(int storage, int64_t B, int64_t T, int64_t C, int64_t count,
                                               const void *x, const void *previous, const float *const *mixes,
                                               const void *const *gradients, void *dx, void *dprevious,
                                               float *const *dmixes, float *scratch, void *stream) {
  ShiftMix a{};
  Sums sums{scratch, 0, C, count * C, C, int(count), {}};
  a.B = B, a.T = T, a.C = C, a.count = count, a.x = x, a.previous = previous;
  a.dx = dx, a.dprevious = dprevious, a.parts = scratch, sums.rows = B * a.blocks();
  for (int i = 0; i < count && i < MAX_MIXES; ++i)
    a.mix[i] = mixes[i], a.grad[i] = gradients[i], sums.out[i] = dmixes[i];
  const bool wide = aligned_all(storage, a);
  return on_rows(storage, a, wide ? WIDE / 2 : 1, [&](auto kind, dim3 grid, dim3 block) {
    using S = decltype(kind);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (wide) CUDA_LAUNCH((shift_mix_backward_kernel<S, WIDE / 2>), grid, block, on, a);
    else CUDA_LAUNCH((shift_mix_backward_kernel<S, 1>), grid, block, on, a);
    const char *error = launched();
    return error ? error : sum_rows(sums, on);
  });
}

extern "C" const char *rwkv_relu_squared(int storage, int64_t n, const void *k, void *h, void *stream) {
  return on_elements<ReluSquared>(storage, {n, {k}, {h}}, stream);
}

extern "C" const char *rwkv_relu_squared_backward(int storage, int64_t n, const void *h, const void *gh, void *dk,
                                                  void *stream) {
  return on_elements<ReluSquaredBackward>(storage, {n, {h, gh}, {dk}}, stream);
}

extern "C" const char *rwkv_sigmoid_gate(int storage, int64_t n, const void *r, const void *y, void *o, void *stream) {
  return on_elements<SigmoidGate>(storage, {n, {r, y}, {o}}, stream);
}

extern "C" const char *rwkv_sigmoid_gate_backward(int storage, int64_t n, const void *r, const void *y, const void *go,
                                                  void *dr, void *dy, void *stream) {
  return on_elements<SigmoidGateBackward>(storage, {n, {r, y, go}, {dr, dy}}, stream);
}
