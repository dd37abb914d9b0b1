// RWKV-4's wkv on the CPU, forward and backward, in float32 whatever the storage type.
//
// The state (n, d, p) represents the sums N = n e^p and D = d e^p. With a = e^p, b = e^(u+k) (both divided by the larger):
//   y  = (a n + b v) / (a d + b)
//   p' = max(p + w, k),  n' = e^(p+w-p') n + e^(k-p') v,  d' = e^(p+w-p') d + e^(k-p')
// Only the ratio a : b counts in y, and a : b = e^(p+w-p') : e^(k-p') e^(u+w), so one pair of exponentials serves y and the
// new state. Only where e^(u+w) is so far from 1 that the pair, flushed to 0 below e^-87, would lose what counts in y does
// y get a pair of its own.
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
#include "wkv4_cpu.h"

#include <algorithm>

namespace rwkv {
namespace {

struct Pair {  // e^(x-m) and e^(y-m) with m = max(x, y): one exponential, as one of the two is 1
  float x, y;
};

inline Pair exp_pair(float x, float y) {
  const float difference = x - y, e = exp_negative(-__builtin_fabsf(difference));
  return {difference < 0 ? e : 1.0f, difference < 0 ? 1.0f : e};
}

inline float larger(float x, float y) { return x < y ? y : x; }

struct State {
  float n[WKV4_LANES], d[WKV4_LANES], p[WKV4_LANES];

  void read(const float *from, int64_t C, int64_t lanes) {
    std::copy_n(from, lanes, n), std::copy_n(from + C, lanes, d), std::copy_n(from + 2 * C, lanes, p);
  }
  void empty(int64_t lanes) {  // the initial state of reference.py
    std::fill_n(n, lanes, 0.0f), std::fill_n(d, lanes, 0.0f), std::fill_n(p, lanes, -1e38f);
  }
  void write(float *to, int64_t C, int64_t lanes) const {
    std::copy_n(n, lanes, to), std::copy_n(d, lanes, to + C), std::copy_n(p, lanes, to + 2 * C);
  }
};

constexpr float NEAR = 40.0f;  // |u + w| up to here: a pair flushed below e^-87 is then below e^-47 in the other's scale

// e^(u+w) of a block's channels, and whether all are near enough to 1 for y to do with the pair of the new state.
struct Bonus {
  float factor[WKV4_LANES];
  bool near = true;

  Bonus(const float *w, const float *u, int64_t lanes) {
    float furthest = 0.0f;
    for (int64_t c = 0; c < lanes; ++c) furthest = larger(furthest, __builtin_fabsf(u[c] + w[c]));
    near = furthest <= NEAR;
#pragma omp simd
    for (int64_t c = 0; c < lanes; ++c) {
      const float x = u[c] + w[c], e = exp_negative(-__builtin_fabsf(x));
      factor[c] = x < 0.0f ? e : 1.0f / e;
    }
  }
};

template <bool WRITE, class S> void prefetch(const S *row, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + c, WRITE);
}

// Some channels of one sequence through one chunk of time. `next` is how far on in memory the next block's rows are: a
// block fetches them while it computes, since the hardware's prefetchers see only short parts of rows, often a page apart.
struct Block {
  int64_t b, first, lanes, begin, end, next;

  // Where the block's channels start in a (B, rows, C) tensor.
  int64_t in(const Wkv4Shape &s, int64_t rows, int64_t row) const { return (b * rows + row) * s.C + first; }
};

// Calls body with every block of a task: forward in time, or backward.
template <class Body> void over_blocks(const Wkv4Shape &s, int64_t task, bool backward, const Body &body) {
  const int64_t b = task / s.ranges(), from = task % s.ranges() * s.width, to = std::min(from + s.width, s.C);
  for (int64_t i = 0; i <= s.saved(); ++i) {
    const int64_t begin = (backward ? s.saved() - i : i) * s.chunk, end = std::min(begin + s.chunk, s.T);
    for (int64_t first = from; first < to; first += WKV4_LANES) {
      const int64_t to_next_chunk = (backward ? -s.chunk : s.chunk) * s.C + from - first;
      const int64_t next = first + WKV4_LANES < to ? WKV4_LANES : to_next_chunk;
      body(Block{b, first, std::min(WKV4_LANES, to - first), begin, end, next});
    }
  }
}

template <class Arguments> bool begins(const Wkv4Shape &s, const Arguments &a, const Block &at, int64_t t) {
  return a.starts && a.starts[at.b * s.T + t];
}

// Where the state before a block's chunk was saved.
template <class Arguments> const float *state_before(const Wkv4Shape &s, const Arguments &a, const Block &at) {
  if (at.begin == 0) return a.state + at.in(s, 3, 0);
  return a.saved + ((at.b * s.saved() + at.begin / s.chunk - 1) * 3) * s.C + at.first;
}

template <bool NEAR_BONUS, class S>
void forward_block(const Wkv4Shape &s, const Wkv4Forward<S> &a, const Block &at, const Bonus &bonus) {
  const float *w = a.w + at.first, *u = a.u + at.first;
  State state;
  state.read(state_before(s, a, at), s.C, at.lanes);
  for (int64_t t = at.begin; t < at.end; ++t) {
    const int64_t row = at.in(s, s.T, t);
    const S *kt = a.k + row, *vt = a.v + row;
    S *yt = a.y + row;
    if (begins(s, a, at, t)) state.empty(at.lanes);
    prefetch<false>(kt + at.next, at.lanes), prefetch<false>(vt + at.next, at.lanes);
    prefetch<true>(yt + at.next, at.lanes);
#pragma omp simd
    for (int64_t c = 0; c < at.lanes; ++c) {
      const float k = load(kt[c]), v = load(vt[c]), n = state.n[c], d = state.d[c], p = state.p[c];
      const Pair next = exp_pair(p + w[c], k);
      const Pair out = NEAR_BONUS ? Pair{next.x, next.y * bonus.factor[c]} : exp_pair(p, u[c] + k);
      store(&yt[c], (out.x * n + out.y * v) / (out.x * d + out.y));
      state.n[c] = next.x * n + next.y * v;
      state.d[c] = next.x * d + next.y;
      state.p[c] = larger(p + w[c], k);
    }
  }
  float *after = at.end == s.T ? a.new_state + at.in(s, 3, 0)
                               : a.saved + ((at.b * s.saved() + at.begin / s.chunk) * 3) * s.C + at.first;
  state.write(after, s.C, at.lanes);
}

// Recomputes the states before each step of a chunk into scratch; `state` ends as the state after the chunk.
template <class S>
void recompute(const Wkv4Shape &s, const Wkv4Backward<S> &a, const Block &at, State &state, float *scratch) {
  const float *w = a.w + at.first;
  for (int64_t t = at.begin; t < at.end; ++t) {
    const S *kt = a.k + at.in(s, s.T, t), *vt = a.v + at.in(s, s.T, t);
    float *n_at = scratch + 5 * (t - at.begin) * WKV4_LANES, *d_at = n_at + WKV4_LANES, *p_at = d_at + WKV4_LANES;
    float *x_at = p_at + WKV4_LANES, *y_at = x_at + WKV4_LANES;
    if (begins(s, a, at, t)) state.empty(at.lanes);
    prefetch<false>(kt + at.next, at.lanes), prefetch<false>(vt + at.next, at.lanes);
#pragma omp simd
    for (int64_t c = 0; c < at.lanes; ++c) {
      const float k = load(kt[c]), v = load(vt[c]), n = state.n[c], d = state.d[c], p = state.p[c];
      n_at[c] = n, d_at[c] = d, p_at[c] = p;
      const Pair next = exp_pair(p + w[c], k);
      x_at[c] = next.x, y_at[c] = next.y;
      state.n[c] = next.x * n + next.y * v;
      state.d[c] = next.x * d + next.y;
      state.p[c] = larger(p + w[c], k);
    }
  }
}

// Between chunks Gn, Gd and q are kept in dstate, the sums for w and u in dw and du. WITH_STATE: q is carried too.
template <bool WITH_STATE, bool NEAR_BONUS, class S>
void backward_block(const Wkv4Shape &s, const Wkv4Backward<S> &a, const Block &at, const Bonus &bonus, float *scratch) {
  const float *w = a.w + at.first, *u = a.u + at.first, *start = state_before(s, a, at);
  float *ds = a.dstate + at.in(s, 3, 0), *dw = a.dw + at.in(s, 1, 0), *du = a.du + at.in(s, 1, 0);
  float gn[WKV4_LANES] = {}, gd[WKV4_LANES] = {}, q[WKV4_LANES] = {};
  float dw_chunk[WKV4_LANES] = {}, du_chunk[WKV4_LANES] = {};
  State state;
  state.read(start, s.C, at.lanes);
  recompute(s, a, at, state, scratch);
  const bool last = at.end == s.T;
  if (!last || WITH_STATE) {
    const float *after = last ? a.gstate + at.in(s, 3, 0) : ds;
    for (int64_t c = 0; c < at.lanes; ++c) {
      gn[c] = after[c], gd[c] = after[c + s.C], q[c] = after[c + 2 * s.C];
      if (last) q[c] -= state.n[c] * gn[c] + state.d[c] * gd[c];
    }
  }
  for (int64_t t = at.end - 1; t >= at.begin; --t) {
    const int64_t row = at.in(s, s.T, t);
    const S *kt = a.k + row, *vt = a.v + row, *gt = a.gy + row;
    S *dkt = a.dk + row, *dvt = a.dv + row;
    const float *n_at = scratch + 5 * (t - at.begin) * WKV4_LANES, *d_at = n_at + WKV4_LANES, *p_at = d_at + WKV4_LANES;
    const float *x_at = p_at + WKV4_LANES, *y_at = x_at + WKV4_LANES;
    prefetch<false>(gt + at.next, at.lanes);
    prefetch<true>(dkt + at.next, at.lanes), prefetch<true>(dvt + at.next, at.lanes);
#pragma omp simd
    for (int64_t c = 0; c < at.lanes; ++c) {
      const float k = load(kt[c]), v = load(vt[c]), n = n_at[c], d = d_at[c], p = p_at[c], decayed = p + w[c];
      const Pair next = {x_at[c], y_at[c]};
      const Pair out = NEAR_BONUS ? Pair{next.x, bonus.factor[c] * next.y} : exp_pair(p, k + u[c]);
      const float inverse = 1.0f / (out.x * d + out.y), y = (out.x * n + out.y * v) * inverse;
      const float g = load(gt[c]) * inverse, du_here = out.x * out.y * g * (v * d - n) * inverse;
      float dk = du_here + next.y * (v * gn[c] + gd[c]), decay = next.x * (n * gn[c] + d * gd[c]);
      if (WITH_STATE) {
        const float won = decayed < k ? q[c] : decayed == k ? 0.5f * q[c] : 0.0f;
        q[c] -= won;
        dk += won, decay += q[c];
      }
      du_chunk[c] += du_here, dw_chunk[c] += decay;
      store(&dkt[c], dk);
      store(&dvt[c], out.y * g + next.y * gn[c]);
      gn[c] = out.x * g + next.x * gn[c];
      gd[c] = next.x * gd[c] - out.x * g * y;
    }
    if (begins(s, a, at, t))  // the empty state does not depend on what came before
      for (int64_t c = 0; c < at.lanes; ++c) gn[c] = gd[c] = q[c] = 0.0f;
  }
  for (int64_t c = 0; c < at.lanes; ++c) {
    if (at.begin == 0) q[c] += start[c] * gn[c] + start[c + s.C] * gd[c];
    ds[c] = gn[c], ds[c + s.C] = gd[c], ds[c + 2 * s.C] = q[c];
    dw[c] = dw_chunk[c] + (last ? 0.0f : dw[c]), du[c] = du_chunk[c] + (last ? 0.0f : du[c]);
  }
}

}  // namespace

template <class S>
void wkv4_forward(const Wkv4Shape &s, const Wkv4Forward<S> &a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    over_blocks(s, task, false, [&](const Block &at) {
      const Bonus bonus(a.w + at.first, a.u + at.first, at.lanes);
      bonus.near ? forward_block<true>(s, a, at, bonus) : forward_block<false>(s, a, at, bonus);
    });
}

template <class S>
void wkv4_backward(const Wkv4Shape &s, const Wkv4Backward<S> &a, float *scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    over_blocks(s, task, true, [&](const Block &at) {
      const Bonus bonus(a.w + at.first, a.u + at.first, at.lanes);
      if (a.gstate)
        bonus.near ? backward_block<true, true>(s, a, at, bonus, scratch)
                   : backward_block<true, false>(s, a, at, bonus, scratch);
      else
        bonus.near ? backward_block<false, true>(s, a, at, bonus, scratch)
                   : backward_block<false, false>(s, a, at, bonus, scratch);
    });
}

template void wkv4_forward(const Wkv4Shape &, const Wkv4Forward<float> &, int64_t, int64_t);
template void wkv4_forward(const Wkv4Shape &, const Wkv4Forward<bf16> &, int64_t, int64_t);
template void wkv4_backward(const Wkv4Shape &, const Wkv4Backward<float> &, float *, int64_t, int64_t);
template void wkv4_backward(const Wkv4Shape &, const Wkv4Backward<bf16> &, float *, int64_t, int64_t);

}  // namespace rwkv
