// What follows the recurrence in RWKV-5, 6 and 7: the norm of each head, RWKV-7's term for the current token, and the
// gate, in one pass over memory. The backward pass computes the norm's statistics again: only the inputs are kept.
#include "head_norm_cpu.h"

#include <cmath>

namespace rwkv {
namespace {

// One token of one head.
template <class S> struct Head {
  const HeadNorm<S> &p;
  int64_t first, at;  // channel, and offset of the channel's element
  float mean, scale, current = 0.0f;

  Head(const HeadNorm<S> &p, int64_t row, int64_t first) : p(p), first(first), at(row * p.C + first) {
    const S *y = p.y + at;
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < p.N; ++n) sum += load(y[n]);
    mean = sum / float(p.N);
#pragma omp simd reduction(+ : squares)
    for (int64_t n = 0; n < p.N; ++n) {
      const float x = load(y[n]) - mean;
      squares += x * x;
    }
    scale = 1.0f / std::sqrt(squares / float(p.N) + p.eps);
    if (!p.r) return;
    const S *r = p.r + at, *k = p.k + at;
    const float *r_k = p.r_k + first;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t n = 0; n < p.N; ++n) dot += load(r[n]) * load(k[n]) * r_k[n];
    current = dot;
  }

  void forward() const {
    const S *y = p.y + at, *gate = p.gate + at;
    const float *weight = p.weight + first, *bias = p.bias + first;
    S *out = p.out + at;
    if (p.r) {
      const S *v = p.v + at;
#pragma omp simd
      for (int64_t n = 0; n < p.N; ++n) {
        const float x = (load(y[n]) - mean) * scale * weight[n] + bias[n] + current * load(v[n]);
        store(&out[n], x * load(gate[n]));
      }
    } else {
#pragma omp simd
      for (int64_t n = 0; n < p.N; ++n)
        store(&out[n], ((load(y[n]) - mean) * scale * weight[n] + bias[n]) * load(gate[n]));
    }
  }

  void backward(float *sums) const {
    const S *y = p.y + at, *gate = p.gate + at, *gout = p.gout + at, *v = p.v ? p.v + at : p.y + at;
    const float *weight = p.weight + first, *bias = p.bias + first;
    S *dy = p.dy + at, *dgate = p.dgate + at;
    float *dweight = sums + first, *dbias = dweight + p.C;
    float sum = 0.0f, along = 0.0f, gcurrent = 0.0f;
#pragma omp simd reduction(+ : sum, along, gcurrent)
    for (int64_t n = 0; n < p.N; ++n) {
      const float x = (load(y[n]) - mean) * scale, g = load(gout[n]), gnorm = g * load(gate[n]), value = load(v[n]);
      store(&dgate[n], g * (x * weight[n] + bias[n] + current * value));
      dweight[n] += gnorm * x, dbias[n] += gnorm;
      sum += gnorm * weight[n], along += gnorm * weight[n] * x, gcurrent += gnorm * value;
    }
    sum /= float(p.N), along /= float(p.N);
#pragma omp simd
    for (int64_t n = 0; n < p.N; ++n) {
      const float x = (load(y[n]) - mean) * scale;
      store(&dy[n], scale * (load(gout[n]) * load(gate[n]) * weight[n] - sum - x * along));
    }
    if (p.r) backward_of_current(gcurrent, dbias + p.C);
  }

  void backward_of_current(float gcurrent, float *dr_k) const {
    const S *r = p.r + at, *k = p.k + at, *gate = p.gate + at, *gout = p.gout + at;
    const float *r_k = p.r_k + first;
    S *dr = p.dr + at, *dk = p.dk + at, *dv = p.dv + at;
#pragma omp simd
    for (int64_t n = 0; n < p.N; ++n) {
      const float receptance = load(r[n]), key = load(k[n]);
      store(&dv[n], load(gout[n]) * load(gate[n]) * current);
      store(&dr[n], gcurrent * key * r_k[n]), store(&dk[n], gcurrent * receptance * r_k[n]);
      dr_k[n] += gcurrent * receptance * key;
    }
  }
};

template <class S, class Body> void over_heads(const HeadNorm<S> &p, int64_t task, const Body &body) {
  for (int64_t row = task * HEAD_NORM_ROWS; row < std::min((task + 1) * HEAD_NORM_ROWS, p.rows); ++row)
    for (int64_t first = 0; first < p.C; first += p.N) body(Head<S>(p, row, first));
}

}  // namespace

template <class S> void head_norm_forward(const HeadNorm<S> &p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) over_heads(p, task, [&](const Head<S> &head) { head.forward(); });
}

template <class S> void head_norm_backward(const HeadNorm<S> &p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    float *sums = p.sums + task * 3 * p.C;
    std::fill_n(sums, 3 * p.C, 0.0f);
    over_heads(p, task, [&](const Head<S> &head) { head.backward(sums); });
  }
}

template void head_norm_forward(const HeadNorm<float> &, int64_t, int64_t);
template void head_norm_forward(const HeadNorm<bf16> &, int64_t, int64_t);
template void head_norm_backward(const HeadNorm<float> &, int64_t, int64_t);
template void head_norm_backward(const HeadNorm<bf16> &, int64_t, int64_t);

}  // namespace rwkv
