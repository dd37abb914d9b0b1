// RWKV-4's wkv on the CPU, forward and backward, in float32 whatever the storage type.
//
// The state (n, d, p) stands for the sums N = n e^p and D = d e^p. With a = e^p, b = e^(u+k) (both divided by the larger):
//   y  = (a n + b v) / (a d + b)
//   p' = max(p + w, k),  n' = e^(p+w-p') n + e^(k-p') v,  d' = e^(p+w-p') d + e^(k-p')
//
// The gradient. Outputs depend on the sums N and D only, not on how p splits them, so the backward pass carries
//   Gn = e^p ∂L/∂N and Gd = e^p ∂L/∂D,
// which obey, with g the gradient of y and c = a d + b:
//   Gn = a g/c + e^(p+w-p') Gn',   Gd = -a y g/c + e^(p+w-p') Gd'
//   dv = b g/c + e^(k-p') Gn',     du += b g (v - y)/c, where v - y = a (v d - n)/c loses no digits if b is large
//   dk = b g (v - y)/c + e^(k-p') (v Gn' + Gd'),     dw += e^(p+w-p') (n Gn' + d Gd')
// Only a loss on the new state itself sees p: n_T = N e^(-p_T), d_T = D e^(-p_T) and p_T with gradients gn, gd, gp give
//   Gn' = gn, Gd' = gd, and q = gp - n_T gn - d_T gd, the derivative along p_T at fixed N and D.
// p_T is k_i + (T-1-i) w for the one step i that won, or p_0 + T w: going back, q reaches w once per step until the
// winning step, whose k takes it (a tie: half each, as torch.maximum has it). What arrives at the start:
//   dn_0 = Gn, dd_0 = Gd, dp_0 = q + n_0 Gn + d_0 Gd.
//
// The backward pass goes chunk by chunk from the end: it recomputes a chunk's states from the saved one into scratch
// that stays in the second-level cache. The sums over time for dw and du are taken per chunk first, which keeps their
// rounding error small, and per sequence and channel, so that results do not depend on the number of threads.
#include "cpu.h"

#include <algorithm>

namespace rwkv {
namespace {

struct Pair {  // e^(x-m) and e^(y-m) with m = max(x, y): one exponential, as one of the two is 1
  float x, y;
};

inline Pair exp_pair(float x, float y) {
  const float difference = x - y, e = exp_negative(difference < 0 ? difference : -difference);
  return {difference < 0 ? e : 1.0f, difference < 0 ? 1.0f : e};
}

inline float larger(float x, float y) { return x < y ? y : x; }

struct State {
  float n[WKV4_LANES], d[WKV4_LANES], p[WKV4_LANES];

  void read(const float *from, int64_t C, int64_t lanes) {
    std::copy_n(from, lanes, n), std::copy_n(from + C, lanes, d), std::copy_n(from + 2 * C, lanes, p);
  }
  void write(float *to, int64_t C, int64_t lanes) const {
    std::copy_n(n, lanes, to), std::copy_n(d, lanes, to + C), std::copy_n(p, lanes, to + 2 * C);
  }
};

// A task reads a short piece of each row, often a page apart from the last: too far for the hardware's prefetchers.
constexpr int64_t AHEAD = 8;

template <bool WRITE, class S> void prefetch(const S *row, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + c, WRITE);
}

struct Block {  // where a task works
  int64_t b, first, lanes;

  Block(const Wkv4Shape &s, int64_t task) : b(task / s.blocks()), first(task % s.blocks() * s.lanes) {
    lanes = std::min(s.lanes, s.C - first);
  }
};

template <class S> void forward_block(const Wkv4Shape &s, const Wkv4Forward<S> &a, const Block &at) {
  const float *w = a.w + at.first, *u = a.u + at.first;
  State state;
  state.read(a.state + at.b * 3 * s.C + at.first, s.C, at.lanes);
  for (int64_t t = 0; t < s.T; ++t) {
    if (t > 0 && t % s.chunk == 0)
      state.write(a.saved + (at.b * s.saved() + t / s.chunk - 1) * 3 * s.C + at.first, s.C, at.lanes);
    const int64_t row = (at.b * s.T + t) * s.C + at.first;
    const S *kt = a.k + row, *vt = a.v + row;
    S *yt = a.y + row;
    if (t + AHEAD < s.T) {
      const int64_t ahead = AHEAD * s.C;
      prefetch<false>(kt + ahead, at.lanes), prefetch<false>(vt + ahead, at.lanes), prefetch<true>(yt + ahead, at.lanes);
    }
#pragma omp simd
    for (int64_t c = 0; c < at.lanes; ++c) {
      const float k = load(kt[c]), v = load(vt[c]), n = state.n[c], d = state.d[c], p = state.p[c];
      const Pair out = exp_pair(p, u[c] + k), next = exp_pair(p + w[c], k);
      store(&yt[c], (out.x * n + out.y * v) / (out.x * d + out.y));
      state.n[c] = next.x * n + next.y * v;
      state.d[c] = next.x * d + next.y;
      state.p[c] = larger(p + w[c], k);
    }
  }
  state.write(a.new_state + at.b * 3 * s.C + at.first, s.C, at.lanes);
}

// Recomputes the states before each step of a chunk into scratch; `state` ends as the state after the chunk.
template <class S>
void recompute(const Wkv4Shape &s, const Wkv4Backward<S> &a, const Block &at, int64_t begin, int64_t end, State &state,
               float *scratch) {
  const float *w = a.w + at.first;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = (at.b * s.T + t) * s.C + at.first;
    const S *kt = a.k + row, *vt = a.v + row;
    float *n_before = scratch + 3 * (t - begin) * s.lanes, *d_before = n_before + s.lanes, *p_before = d_before + s.lanes;
    if (t + AHEAD < end) prefetch<false>(kt + AHEAD * s.C, at.lanes), prefetch<false>(vt + AHEAD * s.C, at.lanes);
#pragma omp simd
    for (int64_t c = 0; c < at.lanes; ++c) {
      const float k = load(kt[c]), v = load(vt[c]), n = state.n[c], d = state.d[c], p = state.p[c];
      n_before[c] = n, d_before[c] = d, p_before[c] = p;
      const Pair next = exp_pair(p + w[c], k);
      state.n[c] = next.x * n + next.y * v;
      state.d[c] = next.x * d + next.y;
      state.p[c] = larger(p + w[c], k);
    }
  }
}

// WITH_STATE: the new state has a gradient, so q is carried too.
template <bool WITH_STATE, class S>
void backward_block(const Wkv4Shape &s, const Wkv4Backward<S> &a, const Block &at, float *scratch) {
  const float *w = a.w + at.first, *u = a.u + at.first;
  const int64_t lanes = at.lanes, state_at = at.b * 3 * s.C + at.first;
  float gn[WKV4_LANES] = {}, gd[WKV4_LANES] = {}, q[WKV4_LANES] = {}, dw[WKV4_LANES] = {}, du[WKV4_LANES] = {};
  State state;
  for (int64_t chunk = s.saved(); chunk >= 0; --chunk) {
    const int64_t begin = chunk * s.chunk, end = std::min(begin + s.chunk, s.T);
    const float *start = chunk ? a.saved + (at.b * s.saved() + chunk - 1) * 3 * s.C + at.first : a.state + state_at;
    state.read(start, s.C, lanes);
    recompute(s, a, at, begin, end, state, scratch);
    if (WITH_STATE && end == s.T) {
      const float *gs = a.gstate + state_at;
      for (int64_t c = 0; c < lanes; ++c) {
        gn[c] = gs[c], gd[c] = gs[c + s.C];
        q[c] = gs[c + 2 * s.C] - state.n[c] * gn[c] - state.d[c] * gd[c];
      }
    }
    float dw_chunk[WKV4_LANES] = {}, du_chunk[WKV4_LANES] = {};
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t row = (at.b * s.T + t) * s.C + at.first;
      const S *kt = a.k + row, *vt = a.v + row, *gt = a.gy + row;
      S *dkt = a.dk + row, *dvt = a.dv + row;
      const float *n_at = scratch + 3 * (t - begin) * s.lanes, *d_at = n_at + s.lanes, *p_at = d_at + s.lanes;
      if (t >= AHEAD) {
        const int64_t ahead = AHEAD * s.C;
        prefetch<false>(gt - ahead, lanes), prefetch<true>(dkt - ahead, lanes), prefetch<true>(dvt - ahead, lanes);
      }
#pragma omp simd
      for (int64_t c = 0; c < lanes; ++c) {
        const float k = load(kt[c]), v = load(vt[c]), n = n_at[c], d = d_at[c], p = p_at[c], decayed = p + w[c];
        const Pair out = exp_pair(p, u[c] + k), next = exp_pair(decayed, k);
        const float inverse = 1.0f / (out.x * d + out.y), y = (out.x * n + out.y * v) * inverse;
        const float g = load(gt[c]) * inverse, bonus = out.x * out.y * g * (v * d - n) * inverse;
        float dk = bonus + next.y * (v * gn[c] + gd[c]), decay = next.x * (n * gn[c] + d * gd[c]);
        if (WITH_STATE) {
          const float won = decayed < k ? q[c] : decayed == k ? 0.5f * q[c] : 0.0f;
          q[c] -= won;
          dk += won, decay += q[c];
        }
        du_chunk[c] += bonus, dw_chunk[c] += decay;
        store(&dkt[c], dk);
        store(&dvt[c], out.y * g + next.y * gn[c]);
        gn[c] = out.x * g + next.x * gn[c];
        gd[c] = next.x * gd[c] - out.x * g * y;
      }
    }
    for (int64_t c = 0; c < lanes; ++c) dw[c] += dw_chunk[c], du[c] += du_chunk[c];
  }
  const float *start = a.state + state_at;
  float *ds = a.dstate + state_at;
  for (int64_t c = 0; c < lanes; ++c) {
    ds[c] = gn[c], ds[c + s.C] = gd[c], ds[c + 2 * s.C] = q[c] + start[c] * gn[c] + start[c + s.C] * gd[c];
    a.dw[at.b * s.C + at.first + c] = dw[c], a.du[at.b * s.C + at.first + c] = du[c];
  }
}

}  // namespace

template <class S>
void wkv4_forward(const Wkv4Shape &s, const Wkv4Forward<S> &a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) forward_block(s, a, Block(s, task));
}

template <class S>
void wkv4_backward(const Wkv4Shape &s, const Wkv4Backward<S> &a, float *scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (a.gstate)
      backward_block<true>(s, a, Block(s, task), scratch);
    else
      backward_block<false>(s, a, Block(s, task), scratch);
  }
}

template void wkv4_forward(const Wkv4Shape &, const Wkv4Forward<float> &, int64_t, int64_t);
template void wkv4_forward(const Wkv4Shape &, const Wkv4Forward<bf16> &, int64_t, int64_t);
template void wkv4_backward(const Wkv4Shape &, const Wkv4Backward<float> &, float *, int64_t, int64_t);
template void wkv4_backward(const Wkv4Shape &, const Wkv4Backward<bf16> &, float *, int64_t, int64_t);

}  // namespace rwkv
