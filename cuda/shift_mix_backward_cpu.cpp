// The gradient of shift_mix on the CPU. A file of its own because it compiles as long as all other element-wise kernels.
#include "elementwise_cpu.h"

namespace rwkv {
namespace {

// Gradients of one row. `carry` (C) holds Σ g_i (1 - μ_i) of the next row on entry and of this row on return: the
// gradient that the shift passes to the row before. dmix (COUNT, C) is added to.
template <int COUNT, class S>
void row_backward(const ShiftMix<S> &a, const S *before, int64_t at, float *carry, float *dmix) {
  const S *x = a.x + at;
#pragma omp simd
  for (int64_t c = 0; c < a.C; ++c) {
    const float difference = load(x[c]) - load_or_zero(before, c);
    float here = carry[c], earlier = 0.0f;
    for (int i = 0; i < COUNT; ++i) {
      const float g = load(a.grad[i][at + c]), direct = g * a.mix[i][c];
      dmix[i * a.C + c] += g * difference;
      here += direct;
      earlier += g - direct;
    }
    store(&a.dx[at + c], here);
    carry[c] = earlier;
  }
}

// Adds the gradient that row `at` alone passes to the row before it.
template <class S> void carried_from(const ShiftMix<S> &a, int64_t at, float *carry) {
  for (int64_t i = 0; i < a.count; ++i) {
    const S *g = a.grad[i] + at;
    const float *mix = a.mix[i];
#pragma omp simd
    for (int64_t c = 0; c < a.C; ++c) carry[c] += load(g[c]) - load(g[c]) * mix[c];
  }
}

}  // namespace

template <class S> void shift_mix_backward(const ShiftMix<S> &a, float *carry, int64_t begin, int64_t end) {
  with_count(a.count, [&](auto count) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / a.blocks(), first = task % a.blocks() * MIX_ROWS, last = std::min(first + MIX_ROWS, a.T);
      float *dmix = a.dmix + task * a.count * a.C;
      std::fill_n(dmix, a.count * a.C, 0.0f);
      std::fill_n(carry, a.C, 0.0f);
      if (last < a.T && !a.begins(b, last)) carried_from(a, (b * a.T + last) * a.C, carry);
      for (int64_t t = last - 1; t >= first; --t) {
        row_backward<count>(a, row_before(a, b, t), (b * a.T + t) * a.C, carry, dmix);
        if (a.begins(b, t)) std::fill_n(carry, a.C, 0.0f);  // no gradient reaches the document before
      }
      if (first == 0 && a.dprevious)
        for (int64_t c = 0; c < a.C; ++c) store(&a.dprevious[b * a.C + c], carry[c]);
    }
  });
}

template void shift_mix_backward(const ShiftMix<float> &, float *, int64_t, int64_t);
template void shift_mix_backward(const ShiftMix<bf16> &, float *, int64_t, int64_t);

}  // namespace rwkv
