// The recurrence of RWKV-4's wkv and its gradient, shared by the sequential and the parallel kernels. The equations of
// both are at the head of wkv4_cpu.cpp.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace rwkv {
namespace {

constexpr int LANES = 32, WARPS = 8, STEPS = 8;  // a chunk is WARPS · STEPS steps
constexpr int CHUNK = int(RWKV_CHUNK), ALONE = 64;  // ALONE: threads in a block of the sequential kernels
constexpr float EMPTY_MAXIMUM = -1e38f;
constexpr float NEAR = 40.f;  // |u + w| up to here: the weights of the new state serve y too, as in wkv4_cpu.cpp
static_assert(CHUNK == WARPS * STEPS, "a block of the parallel kernels works on one chunk at a time");

struct Inputs {
  int64_t B, T, C, segments;
  const float *w, *u;             // (C)
  const void *k, *v;              // (B, T, C)
  const float *state;             // (B, 3, C)
  __host__ __device__ int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
  __host__ __device__ int64_t first_chunk(int64_t segment) const { return segment * chunks() / segments; }
};

struct Forward : Inputs {
  void *y;
  float *new_state, *saved;       // saved: (B, chunks - 1, 3, C), the states before each chunk but the first
  float *summaries, *starts;      // (B, segments, 3, C) of each segment from the empty one; the states before each segment
};

struct Backward : Inputs {
  const float *saved;
  const void *gy;
  const float *gstate;            // of new_state, or null
  void *dk, *dv;
  float *dstate, *parts;          // parts: (2, B · segments, C), of dw and du
  float *maps, *ends;             // (B, segments, 5, C) a segment's map of gradients; the gradients after each
};

struct State {
  float n, d, p;
};

// The gradient of the state after some step, as wkv4_cpu.cpp has it: Gn = e^p ∂L/∂N, Gd = e^p ∂L/∂D, and q.
struct Gradient {
  float n, d, q;
};

// How some steps map the gradient of the state after them: n → n_out + factor · n, d likewise, q → keep · q.
struct Map {
  float factor, keep, n, d;
};

struct Weights {  // e^(past - top) and e^(now - top) with top the larger: one exponential, as one of the two is 1
  float past, now, top;
};

__device__ __forceinline__ Weights weigh(float past, float now) {
  const float difference = past - now, e = __expf(-fabsf(difference));
  return difference < 0.f ? Weights{e, 1.f, now} : Weights{1.f, e, past};
}

__device__ __forceinline__ State empty() { return {0.f, 0.f, EMPTY_MAXIMUM}; }

// The state after `before` and then the steps that `part` summarises, which decay `before` by e^decay.
__device__ __forceinline__ State then(State before, State part, float decay) {
  const Weights e = weigh(before.p + decay, part.p);
  return {fmaf(e.past, before.n, e.now * part.n), fmaf(e.past, before.d, e.now * part.d), e.top};
}

__device__ __forceinline__ State step(State s, float w, float k, float v) { return then(s, {v, 1.f, k}, w); }

// PLAIN is the usual case, without what it does not need: a thread has all its STEPS steps, |u + w| is at most NEAR,
// and going back there is no gradient of new_state, which alone needs q. The `u` of the functions is then e^(u+w).
template <int V> __device__ __forceinline__ bool near(const float *w, const float *u, float *bonus) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < V; ++i) bonus[i] = __expf(u[i] + w[i]), all = all && fabsf(u[i] + w[i]) <= NEAR;
  return all;
}

struct Output {
  Weights e;
  float inverse, y;  // 1 / denominator
};

// `next`: the weights of the state after this step.
template <bool PLAIN> __device__ __forceinline__ Output output(State s, Weights next, float u, float k, float v) {
  const Weights e = PLAIN ? Weights{next.past, next.now * u, 0.f} : weigh(s.p, u + k);
  const float inverse = __fdividef(1.f, fmaf(e.past, s.d, e.now));
  return {e, inverse, fmaf(e.past, s.n, e.now * v) * inverse};
}

// The share of q that passes a step: 1 where the past has the larger exponent, half at a tie.
__device__ __forceinline__ float kept(float decayed, float k) { return decayed < k ? 0.f : decayed == k ? 0.5f : 1.f; }

__device__ __forceinline__ Gradient through(Map m, Gradient g) {
  return {fmaf(m.factor, g.n, m.n), fmaf(m.factor, g.d, m.d), m.keep * g.q};
}

// The map of `later` steps followed, going back in time, by `earlier` ones.
__device__ __forceinline__ Map compose(Map earlier, Map later) {
  return {earlier.factor * later.factor, earlier.keep * later.keep, fmaf(earlier.factor, later.n, earlier.n),
          fmaf(earlier.factor, later.d, earlier.d)};
}

struct Slopes {
  float dk, dv, dw, du;
};

// One step back: s is the state before it, g the gradient of y_t; `after` becomes the gradient of s.
template <bool PLAIN>
__device__ __forceinline__ Slopes step_back(State s, float w, float u, float k, float v, float g, Gradient &after) {
  const float decayed = s.p + w;
  const Weights next = weigh(decayed, k);
  const Output out = output<PLAIN>(s, next, u, k, v);
  const float scaled = g * out.inverse;
  const float bonus = out.e.past * out.e.now * scaled * fmaf(v, s.d, -s.n) * out.inverse;
  const float q = PLAIN ? 0.f : kept(decayed, k) * after.q, won = PLAIN ? 0.f : after.q - q;
  const Slopes result = {bonus + next.now * fmaf(v, after.n, after.d) + won,
                         fmaf(out.e.now, scaled, next.now * after.n),
                         next.past * fmaf(s.n, after.n, s.d * after.d) + q, bonus};
  after = {fmaf(out.e.past, scaled, next.past * after.n), fmaf(next.past, after.d, -out.e.past * scaled * out.y), q};
  return result;
}

// The gradient of the last state, from that of new_state (null: zeros) and the state itself.
__device__ __forceinline__ Gradient at_the_end(const float *gstate, int64_t at, int64_t C, State s) {
  if (!gstate) return {0.f, 0.f, 0.f};
  const float n = gstate[at], d = gstate[at + C];
  return {n, d, gstate[at + 2 * C] - s.n * n - s.d * d};
}

__device__ __forceinline__ State read_state(const float *from, int64_t at, int64_t C) {
  return {from[at], from[at + C], from[at + 2 * C]};
}

__device__ __forceinline__ void write_state(float *to, int64_t at, int64_t C, State s) {
  to[at] = s.n, to[at + C] = s.d, to[at + 2 * C] = s.p;
}

// dn_0, dd_0 and dp_0 from the gradient of the first state.
__device__ __forceinline__ void write_dstate(float *to, int64_t at, int64_t C, State first, Gradient g) {
  write_state(to, at, C, {g.n, g.d, g.q + first.n * g.n + first.d * g.d});
}

// How many of its next STEPS steps a thread has, given how many are left; STEPS + 1 where more follow them.
__device__ __forceinline__ int steps_of(int64_t left) {
  return left < 0 ? 0 : left > STEPS ? STEPS + 1 : int(left);
}

// `count` rows of V channels, at most STEPS; the rest of `to` is not written. APART: the usual case, all of them, needs no
// predicates, but registers for its addresses.
template <class S, int V, bool APART = true>
__device__ __forceinline__ void load_steps(Pack<S, V> *to, const void *from, int64_t at, int64_t C, int count) {
  const S *row = static_cast<const S *>(from) + at;
  if (APART && count >= STEPS) {
#pragma unroll
    for (int j = 0; j < STEPS; ++j, row += C) to[j] = load<S, V>(row);
  } else {
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
      if (j < count) to[j] = load<S, V>(row + j * C);
  }
}

// The state that STEPS steps give from the empty one. With fewer steps it is not used.
template <class S, int V>
__device__ __forceinline__ void summarise(const Pack<S, V> *k, const Pack<S, V> *v, const float *w, State *local) {
  float x[STEPS][V];
#pragma unroll
  for (int i = 0; i < V; ++i) local[i] = empty();
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    unpack<S, V>(k[j], x[j]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[j][i] = fmaf(float(STEPS - 1 - j), w[i], x[j][i]);
      local[i].p = fmaxf(local[i].p, x[j][i]);
    }
  }
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    float vj[V];
    unpack<S, V>(v[j], vj);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float e = __expf(x[j][i] - local[i].p);
      local[i].n = fmaf(e, vj[i], local[i].n), local[i].d += e;
    }
  }
}

// The outputs of STEPS steps; s becomes the state after them.
template <bool PLAIN, class S, int V>
__device__ __forceinline__ void go_forward(const Pack<S, V> *k, const Pack<S, V> *v, int count, const float *w,
                                           const float *u, State *s, S *y, int64_t C) {
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    if (PLAIN || j < count) {
      float kj[V], vj[V], yj[V];
      unpack<S, V>(k[j], kj), unpack<S, V>(v[j], vj);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        yj[i] = output<PLAIN>(s[i], weigh(s[i].p + w[i], kj[i]), u[i], kj[i], vj[i]).y;
        s[i] = step(s[i], w[i], kj[i], vj[i]);
      }
      store<S, V>(y + j * C, yj);
    }
  }
}

// The gradients of STEPS steps, from the last back to the first; g is that of the state after them and becomes that of
// the state before them; dw and du are added to. `before` holds the states before the even steps only: computing the
// odd ones again costs less than their registers.
template <bool PLAIN, class S, int V>
__device__ __forceinline__ void go_back(const Pack<S, V> *k, const Pack<S, V> *v, const Pack<S, V> *gy,
                                        const State (*before)[V], int count, const float *w, const float *u, Gradient *g,
                                        float *dw, float *du, S *dk, S *dv, int64_t C) {
#pragma unroll
  for (int j = STEPS - 1; j >= 0; --j) {
    if (PLAIN || j < count) {
      float kj[V], vj[V], gj[V], k_before[V], v_before[V], dkj[V], dvj[V];
      unpack<S, V>(k[j], kj), unpack<S, V>(v[j], vj), unpack<S, V>(gy[j], gj);
      unpack<S, V>(k[j & ~1], k_before), unpack<S, V>(v[j & ~1], v_before);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        State s = before[j / 2][i];
        if (j % 2) s = step(s, w[i], k_before[i], v_before[i]);
        const Slopes slope = step_back<PLAIN>(s, w[i], u[i], kj[i], vj[i], gj[i], g[i]);
        dkj[i] = slope.dk, dvj[i] = slope.dv, dw[i] += slope.dw, du[i] += slope.du;
      }
      store<S, V>(dk + j * C, dkj), store<S, V>(dv + j * C, dvj);
    }
  }
}

// Where a thread works: V channels from c on of sequence b; its segment of time where there are several.
struct Position {
  int64_t b, c;
  int segment;
  bool inside;
};

}  // namespace
}  // namespace rwkv
