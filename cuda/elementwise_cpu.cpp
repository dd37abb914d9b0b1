// The element-wise parts of a block, each in one pass over memory instead of one per PyTorch operator.
#include "cpu.h"

#include <algorithm>
#include <type_traits>

namespace rwkv {
namespace {

// The row before row t of sequence b: of x, or `previous` for t = 0; null, which is zeros, where a document begins.
template <class S> const S *row_before(const ShiftMix<S> &a, int64_t b, int64_t t) {
  if (a.begins(b, t)) return nullptr;
  if (t > 0) return a.x + (b * a.T + t - 1) * a.C;
  return a.previous ? a.previous + b * a.C : nullptr;
}

template <class S> inline float load_or_zero(const S *row, int64_t c) { return row ? load(row[c]) : 0.0f; }

// The loops below take the number of mixes as a constant: a channel's loads serve all of them, in registers.
template <class Body> void with_count(int64_t count, const Body &body) {
  static_assert(MOST_MIXES == 8);
  switch (count) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    case 6: return body(std::integral_constant<int, 6>());
    case 7: return body(std::integral_constant<int, 7>());
    case 8: return body(std::integral_constant<int, 8>());
  }
}

template <int COUNT, class S> void row_forward(const ShiftMix<S> &a, const S *before, int64_t at) {
  const S *x = a.x + at;
#pragma omp simd
  for (int64_t c = 0; c < a.C; ++c) {
    const float old = load_or_zero(before, c), difference = load(x[c]) - old;
    for (int i = 0; i < COUNT; ++i) store(&a.out[i][at + c], old + difference * a.mix[i][c]);
  }
}

// Gradients of one row. `carry` (C) holds Σ g_i (1 - μ_i) of the next row on entry and of this row on return: what the
// shift hands to the row before. dmix (COUNT, C) is added to.
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

// What row `at` hands to the row before it, alone.
template <class S> void carried_from(const ShiftMix<S> &a, int64_t at, float *carry) {
  for (int64_t i = 0; i < a.count; ++i) {
    const S *g = a.grad[i] + at;
    const float *mix = a.mix[i];
#pragma omp simd
    for (int64_t c = 0; c < a.C; ++c) carry[c] += load(g[c]) - load(g[c]) * mix[c];
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
        if (a.begins(b, t)) std::fill_n(carry, a.C, 0.0f);  // nothing goes back into the document before
      }
      if (first == 0 && a.dprevious)
        for (int64_t c = 0; c < a.C; ++c) store(&a.dprevious[b * a.C + c], carry[c]);
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
  for (int64_t i = begin; i < end; ++i) {
    const float x = load(r[i]), e = exp_negative(x < 0.0f ? x : -x), s = 1.0f / (1.0f + e);
    store(&o[i], (x < 0.0f ? e * s : s) * load(y[i]));
  }
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

void sum_rows(const float *in, float *out, int64_t rows, int64_t n, int64_t stride) {
  std::fill_n(out, n, 0.0f);
  for (int64_t row = 0; row < rows; ++row)
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] += in[row * stride + c];
}

#define RWKV_ELEMENTWISE(S)                                                                              \
  template void shift_mix_forward(const ShiftMix<S> &, int64_t, int64_t);                                \
  template void shift_mix_backward(const ShiftMix<S> &, float *, int64_t, int64_t);                      \
  template void relu_squared_forward(const S *, S *, int64_t, int64_t);                                  \
  template void relu_squared_backward(const S *, const S *, S *, int64_t, int64_t);                      \
  template void sigmoid_gate_forward(const S *, const S *, S *, int64_t, int64_t);                       \
  template void sigmoid_gate_backward(const S *, const S *, const S *, S *, S *, int64_t, int64_t);
RWKV_ELEMENTWISE(float)
RWKV_ELEMENTWISE(bf16)

}  // namespace rwkv
