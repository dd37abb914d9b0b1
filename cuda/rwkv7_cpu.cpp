// The element-wise parts of RWKV-7's time mix between its matrix products and its recurrence, each in one pass over
// memory instead of one per PyTorch operator. The backward passes compute again what the forward passes had: only the
// inputs are kept.
#include "rwkv7_cpu.h"

#include <cmath>
#include <memory>

namespace rwkv {
namespace {

// Calls body(row) for the rows of each task, and before(task) before them.
template <class Before, class Body>
void over_rows(int64_t rows, int64_t begin, int64_t end, const Before &before, const Body &body) {
  for (int64_t task = begin; task < end; ++task) {
    before(task);
    for (int64_t row = task * RWKV7_ROWS; row < std::min((task + 1) * RWKV7_ROWS, rows); ++row) body(row);
  }
}

inline float inverse_norm(float sum_of_squares) { return 1.0f / std::max(std::sqrt(sum_of_squares), RWKV7_MIN_NORM); }

template <class S> float sum_of_squares(const S *k, const float *k_k, int64_t N) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < N; ++n) {
    const float x = load(k[n]) * k_k[n];
    sum += x * x;
  }
  return sum;
}

}  // namespace

template <class S> void rwkv7_keys_forward(const Rwkv7Keys<S> &p, int64_t begin, int64_t end) {
  over_rows(p.rows, begin, end, [](int64_t) {}, [&](int64_t row) {
    for (int64_t first = 0; first < p.C; first += p.N) {
      const int64_t at = row * p.C + first;
      const S *k = p.k + at, *w_delta = p.w_delta + at, *a_delta = p.a_delta + at;
      const float *w0 = p.w0 + first, *a0 = p.a0 + first, *k_k = p.k_k + first, *k_a = p.k_a + first;
      float *w = p.w + at;
      S *new_k = p.new_k + at, *a = p.a + at, *b = p.b + at;
      const float scale = inverse_norm(sum_of_squares(k, k_k, p.N));
#pragma omp simd
      for (int64_t n = 0; n < p.N; ++n) {
        const float key = load(k[n]), kappa = key * k_k[n] * scale, rate = sigmoid(a0[n] + load(a_delta[n]));
        w[n] = RWKV7_LOG_DECAY * sigmoid(w0[n] + load(w_delta[n]));
        store(&new_k[n], key * (1.0f + (rate - 1.0f) * k_a[n]));
        store(&a[n], -kappa), store(&b[n], kappa * rate);
      }
    }
  });
}

template <class S> void rwkv7_keys_backward(const Rwkv7Keys<S> &p, int64_t begin, int64_t end) {
  const std::unique_ptr<float[]> scratch(new float[size_t(2 * p.N)]);
  float *const rates = scratch.get(), *const gkappas = rates + p.N, *sums = nullptr;
  const auto clear = [&](int64_t task) { std::fill_n(sums = p.sums + task * 4 * p.C, 4 * p.C, 0.0f); };
  over_rows(p.rows, begin, end, clear, [&](int64_t row) {
    for (int64_t first = 0; first < p.C; first += p.N) {
      const int64_t at = row * p.C + first;
      const S *k = p.k + at, *w_delta = p.w_delta + at, *a_delta = p.a_delta + at;
      const S *gk = p.gk + at, *ga = p.ga + at, *gb = p.gb + at;
      const float *w0 = p.w0 + first, *a0 = p.a0 + first, *k_k = p.k_k + first, *k_a = p.k_a + first, *gw = p.gw + at;
      S *dk = p.dk + at, *dw_delta = p.dw_delta + at, *da_delta = p.da_delta + at;
      float *dw0 = sums + first, *da0 = dw0 + p.C, *dk_k = da0 + p.C, *dk_a = dk_k + p.C;
      const float squares = sum_of_squares(k, k_k, p.N), scale = inverse_norm(squares);
      float along = 0.0f;  // κ · gκ
#pragma omp simd reduction(+ : along)
      for (int64_t n = 0; n < p.N; ++n) {
        rates[n] = sigmoid(a0[n] + load(a_delta[n]));
        gkappas[n] = load(gb[n]) * rates[n] - load(ga[n]);
        along += gkappas[n] * (load(k[n]) * k_k[n] * scale);
      }
      if (std::sqrt(squares) < RWKV7_MIN_NORM) along = 0.0f;  // divided by a constant there
#pragma omp simd
      for (int64_t n = 0; n < p.N; ++n) {
        const float key = load(k[n]), rate = rates[n], kappa = key * k_k[n] * scale, gkey = load(gk[n]);
        const float gproduct = (gkappas[n] - kappa * along) * scale;  // of k ⊙ k_k
        store(&dk[n], gkey * (1.0f + (rate - 1.0f) * k_a[n]) + gproduct * k_k[n]);
        const float grate = (load(gb[n]) * kappa + gkey * key * k_a[n]) * (rate * (1.0f - rate));
        const float s = sigmoid(w0[n] + load(w_delta[n])), gdecay = gw[n] * RWKV7_LOG_DECAY * (s * (1.0f - s));
        store(&da_delta[n], grate), store(&dw_delta[n], gdecay);
        dw0[n] += gdecay, da0[n] += grate, dk_k[n] += gproduct * key, dk_a[n] += gkey * key * (rate - 1.0f);
      }
    }
  });
}

template <class S> void rwkv7_values_forward(const Rwkv7Values<S> &p, int64_t begin, int64_t end) {
  over_rows(p.rows, begin, end, [](int64_t) {}, [&](int64_t row) {
    const int64_t at = row * p.C;
    const S *v = p.v + at, *v_first = p.v_first + at, *v_delta = p.v_delta + at;
    S *out = p.out + at;
#pragma omp simd
    for (int64_t c = 0; c < p.C; ++c) {
      const float value = load(v[c]);
      store(&out[c], value + sigmoid(p.v0[c] + load(v_delta[c])) * (load(v_first[c]) - value));
    }
  });
}

template <class S> void rwkv7_values_backward(const Rwkv7Values<S> &p, int64_t begin, int64_t end) {
  float *dv0 = nullptr;
  const auto clear = [&](int64_t task) { std::fill_n(dv0 = p.sums + task * p.C, p.C, 0.0f); };
  over_rows(p.rows, begin, end, clear, [&](int64_t row) {
    const int64_t at = row * p.C;
    const S *v = p.v + at, *v_first = p.v_first + at, *v_delta = p.v_delta + at, *gout = p.gout + at;
    S *dv = p.dv + at, *dv_first = p.dv_first + at, *dv_delta = p.dv_delta + at;
#pragma omp simd
    for (int64_t c = 0; c < p.C; ++c) {
      const float s = sigmoid(p.v0[c] + load(v_delta[c])), g = load(gout[c]), gfirst = g * s;
      const float gdelta = g * (load(v_first[c]) - load(v[c])) * (s * (1.0f - s));
      store(&dv[c], g - gfirst), store(&dv_first[c], gfirst), store(&dv_delta[c], gdelta);
      dv0[c] += gdelta;
    }
  });
}

#define RWKV7(S)                                                                 \
  template void rwkv7_keys_forward(const Rwkv7Keys<S> &, int64_t, int64_t);      \
  template void rwkv7_keys_backward(const Rwkv7Keys<S> &, int64_t, int64_t);     \
  template void rwkv7_values_forward(const Rwkv7Values<S> &, int64_t, int64_t);  \
  template void rwkv7_values_backward(const Rwkv7Values<S> &, int64_t, int64_t);
RWKV7(float)
RWKV7(bf16)

}  // namespace rwkv
