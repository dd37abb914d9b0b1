// RWKV-4's wkv on a GPU, forward and backward, in float32 whatever the storage type: which kernels are launched.
// docs/kernels.md explains why the work is cut as it is, and what is assumed of ptxas. Every sum is taken in one order:
// results are bit-equal from run to run.
#include "sum_rows.cuh"
#include "wkv4_parallel.cuh"
#include "wkv4_sequential.cuh"

namespace rwkv {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S, int V> const char *forward(const Forward &a, cudaStream_t stream) {
  const int64_t columns = divide_up(a.C, LANES * V);
  const dim3 block(LANES, WARPS);
  if (a.segments == 0) {
    const dim3 grid(unsigned(divide_up(a.B * divide_up(a.C, V), ALONE)));
    CUDA_LAUNCH((wkv4_forward_sequential_kernel<S, V>), grid, dim3(ALONE), stream, a);
    return launched();
  }
  if (a.segments > 1) {
    const dim3 summaries(unsigned(columns * a.B * (a.segments - 1))), channels(unsigned(divide_up(a.B * a.C, WARPS)));
    CUDA_LAUNCH((wkv4_forward_kernel<S, V, true>), summaries, block, stream, a);
    if (const char *error = launched()) return error;
    CUDA_LAUNCH(wkv4_starts_kernel, channels, block, stream, a);
    if (const char *error = launched()) return error;
  }
  const dim3 grid(unsigned(columns * a.B * a.segments));
  CUDA_LAUNCH((wkv4_forward_kernel<S, V, false>), grid, block, stream, a);
  return launched();
}

template <class S, int V> const char *backward(const Backward &a, float *dw, float *du, cudaStream_t stream) {
  const int64_t columns = divide_up(a.C, LANES * V);
  const dim3 block(LANES, WARPS);
  if (a.segments == 0) {
    const dim3 grid(unsigned(divide_up(a.B * divide_up(a.C, V), ALONE)));
    CUDA_LAUNCH((wkv4_backward_sequential_kernel<S, V>), grid, dim3(ALONE), stream, a);
  } else {
    if (a.segments > 1) {
      const dim3 maps(unsigned(columns * a.B * (a.segments - 1))), channels(unsigned(divide_up(a.B * a.C, WARPS)));
      CUDA_LAUNCH((wkv4_backward_kernel<S, V, true>), maps, block, stream, a);
      if (const char *error = launched()) return error;
      CUDA_LAUNCH(wkv4_ends_kernel, channels, block, stream, a);
      if (const char *error = launched()) return error;
    }
    const dim3 grid(unsigned(columns * a.B * a.segments));
    CUDA_LAUNCH((wkv4_backward_kernel<S, V, false>), grid, block, stream, a);
  }
  if (const char *error = launched()) return error;
  const int64_t rows = a.B * (a.segments > 1 ? a.segments : 1);
  return sum_rows({a.parts, rows, a.C, a.C, rows * a.C, 2, {dw, du}}, stream);
}

const char *refused(int64_t B, int64_t T, int64_t C, int64_t segments) {
  const int64_t chunks = divide_up(T, CHUNK);
  if (B < 1 || T < 1 || C < 1) return "wkv4 needs B, T and C of at least 1";
  if (chunks > 0x7fffffff) return "wkv4: T is beyond 2^37";
  if (segments < 0 || segments > chunks) return "wkv4 needs 0 segments or 1 to as many as there are chunks";
  if (B * divide_up(C, LANES) * (segments > 1 ? segments : 1) > 0x7fffffff) return "wkv4: more blocks than a grid has";
  return nullptr;
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

extern "C" const char *rwkv_wkv4_forward(int storage, int64_t B, int64_t T, int64_t C, int64_t segments, const float *w,
                                         const float *u, const void *k, const void *v, const float *state, void *y,
                                         float *new_state, float *saved, float *scratch, void *stream) {
  if (const char *why = refused(B, T, C, segments)) return why;
  Forward a{};
  a.B = B, a.T = T, a.C = C, a.segments = segments, a.w = w, a.u = u, a.k = k, a.v = v, a.state = state;
  a.y = y, a.new_state = new_state, a.saved = saved;
  if (segments > 1) a.summaries = scratch, a.starts = scratch + B * segments * 3 * C;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return with_storage(storage, [&](auto kind) {
    using S = decltype(kind);
    return aligned<S, 2>(C, k, v, y) ? forward<S, 2>(a, on) : forward<S, 1>(a, on);
  });
}

extern "C" const char *rwkv_wkv4_backward(int storage, int64_t B, int64_t T, int64_t C, int64_t segments, const float *w,
                                          const float *u, const void *k, const void *v, const float *state,
                                          const float *saved, const void *gy, const float *gstate, void *dk, void *dv,
                                          float *dw, float *du, float *dstate, float *scratch, void *stream) {
  if (const char *why = refused(B, T, C, segments)) return why;
  Backward a{};
  a.B = B, a.T = T, a.C = C, a.segments = segments, a.w = w, a.u = u, a.k = k, a.v = v, a.state = state;
  a.saved = saved, a.gy = gy, a.gstate = gstate, a.dk = dk, a.dv = dv, a.dstate = dstate, a.parts = scratch;
  if (segments > 1) a.maps = scratch + 2 * B * segments * C, a.ends = a.maps + 5 * B * segments * C;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return with_storage(storage, [&](auto kind) {
    using S = decltype(kind);
    return aligned<S, 2>(C, k, v, gy, dk, dv) ? backward<S, 2>(a, dw, du, on) : backward<S, 1>(a, dw, du, on);
  });
}
