// The element-wise parts of a block, each in one pass over memory instead of one per PyTorch operator: token shift with
// its mixes (forward; shift_mix_backward_cpu.cpp has the gradient), relu(k)² and σ(r) y.
#include "elementwise_cpu.h"

namespace rwkv {
namespace {

template <int COUNT, class S> void row_forward(const ShiftMix<S> &a, const S *before, int64_t at) {
  const S *x = a.x + at;
#pragma omp simd
  for (int64_t c = 0; c < a.C; ++c) {
    const float old = load_or_zero(before, c), difference = load(x[c]) - old;
    for (int i = 0; i < COUNT; ++i) store(&a.out[i][at + c], old + difference * a.mix[i][c]);
  }
}

}  // namespace

template <class S> void shift_mix_forward(const ShiftMix<S> &a, int64_t begin, int64_t end) {
  with_count(a.count, [&](auto count) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / a.blocks(), first = task % a.blocks() * MIX_ROWS, last = std::min(first + MIX_ROWS, a.T);
      for (int64_t t = first; t < last; ++t) row_forward<count>(a, row_before(a, b, t), (b * a.T + t) * a.C);
    }
  });
}

template <class S> void relu_squared_forward(const S *k, S *h, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float x = load(k[i]), positive = x < 0.0f ? 0.0f : x;  // in this order a NaN stays one
    store(&h[i], positive * positive);
  }
}

// With h = relu(k)^2 saved instead of k: dk = 2 relu(k) gh = 2 sqrt(h) gh, and k need not be kept.
template <class S> void relu_squared_backward(const S *h, const S *gh, S *dk, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) store(&dk[i], 2.0f * __builtin_sqrtf(load(h[i])) * load(gh[i]));
}

template <class S> void sigmoid_gate_forward(const S *r, const S *y, S *o, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) store(&o[i], sigmoid(load(r[i])) * load(y[i]));
}

template <class S>
void sigmoid_gate_backward(const S *r, const S *y, const S *go, S *dr, S *dy, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float x = load(r[i]), g = load(go[i]), e = exp_negative(x < 0.0f ? x : -x), s = 1.0f / (1.0f + e);
    store(&dr[i], g * load(y[i]) * (e * s * s));  // σ(r) (1 - σ(r)) without the cancellation
    store(&dy[i], g * (x < 0.0f ? e * s : s));
  }
}

#define RWKV_ELEMENTWISE(S)                                                        \
  template void shift_mix_forward(const ShiftMix<S> &, int64_t, int64_t);          \
  template void relu_squared_forward(const S *, S *, int64_t, int64_t);            \
  template void relu_squared_backward(const S *, const S *, S *, int64_t, int64_t); \
  template void sigmoid_gate_forward(const S *, const S *, S *, int64_t, int64_t); \
  template void sigmoid_gate_backward(const S *, const S *, const S *, S *, S *, int64_t, int64_t);
RWKV_ELEMENTWISE(float)
RWKV_ELEMENTWISE(bf16)

}  // namespace rwkv
