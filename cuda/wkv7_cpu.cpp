// RWKV-7's generalised delta rule on the CPU, forward and backward, in float32 whatever the storage type.
//
// Per head the state is a matrix S, its rows numbered by value channel, its columns by key channel:
//   u = S a,   S' = S diag(d) + u bᵀ + v kᵀ with d = e^w,   y = S' r
// The rows do not depend on each other: a few at a time go through a whole chunk of steps, and stay in registers.
//
// The gradient. With G the gradient of S', gy r^T of y included, and g = G b that of u:
//   dr = S'ᵀ gy,  dv = G k,  dk = Gᵀ v,  db = Gᵀ u,  da = Sᵀ g,  dw_j = d_j Σ_i G_ij S_ij,  the gradient of S: G diag(d) + g aᵀ
// The rows of G do not depend on each other either; dr, dk, db, da and dw are sums over the rows. The backward pass goes
// chunk by chunk from the end: a few rows at a time recompute a chunk's states from the saved one, and go back through it.
//
// Decays are only multiplied, and never divided out, so any w <= 0 is safe. The bits of a step depend on the state before
// it, and not on where chunks begin: a document has the same bits alone and in a packed row.
#include "wkv7_cpu.h"

#include <algorithm>

namespace rwkv {
namespace {

constexpr int64_t R = WKV7_ROWS;

// Steps of one sequence and head: a chunk of time. Tensors are (B, T, H, N), in scratch memory (steps, width).
struct Chunk {
  const Wkv7Shape &s;
  int64_t b, h, begin, end;

  int64_t steps() const { return end - begin; }
  int64_t in(int64_t t) const { return ((b * s.T + t) * s.H + h) * s.N; }
  int64_t state() const { return (b * s.H + h) * s.N * s.N; }
  int64_t saved() const { return ((b * s.saved() + begin / s.chunk - 1) * s.H + h) * s.N * s.N; }
};

// Calls body with every chunk of a sequence and head: forward in time, or backward.
template <class Body> void over_chunks(const Wkv7Shape &s, int64_t head, bool backward, const Body &body) {
  for (int64_t i = 0; i <= s.saved(); ++i) {
    const int64_t begin = (backward ? s.saved() - i : i) * s.chunk;
    body(Chunk{s, head / s.H, head % s.H, begin, std::min(begin + s.chunk, s.T)});
  }
}

template <class S> void read(const Chunk &at, const S *from, float *to) {
  for (int64_t t = at.begin; t < at.end; ++t, to += at.s.width()) {
    const S *row = from + at.in(t);
#pragma omp simd
    for (int64_t j = 0; j < at.s.N; ++j) to[j] = load(row[j]);
  }
}

template <class S> void write(const Chunk &at, const float *from, S *to) {
  for (int64_t t = at.begin; t < at.end; ++t, from += at.s.width()) {
    S *row = to + at.in(t);
#pragma omp simd
    for (int64_t j = 0; j < at.s.N; ++j) store(&row[j], from[j]);
  }
}

void read_decay(const Chunk &at, const float *w, float *to) {
  for (int64_t t = at.begin; t < at.end; ++t, to += at.s.width()) {
    const float *row = w + at.in(t);
#pragma omp simd
    for (int64_t j = 0; j < at.s.N; ++j) to[j] = exp_negative(row[j]);
  }
}

// A matrix (N, N) from row `first` on, and rows of `width` floats in scratch memory.
void read_rows(const Wkv7Shape &s, const float *from, int64_t first, int64_t count, float *to) {
  for (int64_t i = 0; i < std::min(count, s.N - first); ++i)
    std::copy_n(from + (first + i) * s.N, s.N, to + i * s.width());
}

void write_rows(const Wkv7Shape &s, const float *from, int64_t first, int64_t count, float *to) {
  for (int64_t i = 0; i < std::min(count, s.N - first); ++i)
    std::copy_n(from + i * s.width(), s.N, to + (first + i) * s.N);
}

// Hands out scratch memory, aligned to whole vectors and filled with zeros: what lies beyond N stays zero.
struct Memory {
  float *free;
  explicit Memory(float *scratch)
      : free(reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(scratch) + 4 * LANES - 1) & ~uintptr_t(4 * LANES - 1))) {}
  float *take(int64_t floats) {
    float *taken = free;
    free += (floats + LANES - 1) / LANES * LANES;
    std::fill_n(taken, free - taken, 0.0f);
    return taken;
  }
};

inline vec *vectors(float *x) { return reinterpret_cast<vec *>(x); }
inline const vec *vectors(const float *x) { return reinterpret_cast<const vec *>(x); }

// The inputs of a chunk in scratch memory.
struct Steps {
  float *r, *d, *k, *v, *a, *b;
  const bool *begins = nullptr;  // at which step a document begins, or null

  Steps(const Wkv7Shape &s, Memory &memory) {
    for (float **x : {&r, &d, &k, &v, &a, &b}) *x = memory.take(s.steps() * s.width());
  }
  template <class S> void read_from(const Chunk &at, const Wkv7Inputs<S> &in) {
    read(at, in.r, r), read(at, in.k, k), read(at, in.v, v), read(at, in.a, a), read(at, in.b, b);
    read_decay(at, in.w, d);
    begins = in.starts ? in.starts + at.b * at.s.T + at.begin : nullptr;
  }
  bool begin(int64_t t) const { return begins && begins[t]; }
};

// V: vectors in a row, if the compiler knows it, else 0. What follows takes R rows, from row `first` on, through a chunk.
template <int V> struct Rows {
  const Steps &x;
  int64_t width, first, steps;

  int64_t count() const { return V ? V : width / LANES; }
  const vec *row(const float *of, int64_t t) const { return vectors(of + t * width); }
  const float *scalars(const float *of, int64_t t) const { return of + t * width + first; }

  // u = S a
  void along_a(const vec *state, int64_t t, float *u) const {
    const int64_t n = count();
    const vec *a = row(x.a, t);
    vec sums[R] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 8
      for (int64_t i = 0; i < R; ++i) sums[i] += state[i * n + c] * a[c];
    sum_lanes(sums, u);
  }

  // S' = S diag(d) + u bᵀ + v kᵀ
  void step(const vec *state, int64_t t, const float *u, vec *next) const {
    const int64_t n = count();
    const vec *d = row(x.d, t), *b = row(x.b, t), *k = row(x.k, t);
    const float *v = scalars(x.v, t);
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 8
      for (int64_t i = 0; i < R; ++i)
        next[i * n + c] = (state[i * n + c] * d[c] + k[c] * v[i]) + b[c] * u[i];
  }

  void forward(float *rows, float *y) const {
    const int64_t n = count();
    vec fixed[V ? R * V : 1], *state = V ? fixed : vectors(rows);
    if (V) std::copy_n(vectors(rows), R * V, fixed);
    for (int64_t t = 0; t < steps; ++t) {
      if (x.begin(t)) std::fill_n(state, R * n, vec{});
      float u[R];
      along_a(state, t, u);
      step(state, t, u, state);
      const vec *r = row(x.r, t);
      vec sums[R] = {};
#pragma GCC unroll 8
      for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 8
        for (int64_t i = 0; i < R; ++i) sums[i] += state[i * n + c] * r[c];
      sum_lanes(sums, y + t * width + first);
    }
    if (V) std::copy_n(fixed, R * V, vectors(rows));
  }

  // The states of a chunk, states[0] given: states[t + 1] is the one after step t. us: (steps, R).
  void recompute(float *states, float *us, const float *zeros) const {
    for (int64_t t = 0; t < steps; ++t) {
      const vec *before = vectors(x.begin(t) ? zeros : states + t * R * width);
      along_a(before, t, us + t * R);
      step(before, t, us + t * R, vectors(states + (t + 1) * R * width));
    }
  }

  struct Sums {
    float *dr, *dd, *dk, *dv, *da, *db;
  };

  // g, and the rows of dv; G is that of the state after step t, with the gradient of y_t added.
  void after(vec *G, int64_t t, const vec *state, const float *gy, const Sums &to, float *g) const {
    const int64_t n = count();
    const vec *r = row(x.r, t), *k = row(x.k, t), *b = row(x.b, t);
    vec *dr = vectors(to.dr + t * width), along_k[R] = {}, along_b[R] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; ++c) {
      vec sum = dr[c];
#pragma GCC unroll 8
      for (int64_t i = 0; i < R; ++i) {
        vec &here = G[i * n + c];
        here += r[c] * gy[i];
        along_k[i] += here * k[c], along_b[i] += here * b[c];
        sum += state[i * n + c] * gy[i];
      }
      dr[c] = sum;
    }
    sum_lanes(along_k, to.dv + t * width + first), sum_lanes(along_b, g);
  }

  // The sums over rows that take the state before step t; G becomes the gradient of that state.
  void before(vec *G, int64_t t, const vec *state, const float *u, const float *g, const Sums &to) const {
    const int64_t n = count();
    const vec *d = row(x.d, t), *a = row(x.a, t);
    const float *v = scalars(x.v, t);
    vec *dk = vectors(to.dk + t * width), *db = vectors(to.db + t * width), *da = vectors(to.da + t * width),
        *dd = vectors(to.dd + t * width);
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; ++c) {
      vec k_sum = dk[c], b_sum = db[c], a_sum = da[c], d_sum = dd[c];
#pragma GCC unroll 8
      for (int64_t i = 0; i < R; ++i) {
        vec &here = G[i * n + c];
        const vec old = state[i * n + c];
        k_sum += here * v[i], b_sum += here * u[i], a_sum += old * g[i], d_sum += here * old;
        here = here * d[c] + a[c] * g[i];
      }
      dk[c] = k_sum, db[c] = b_sum, da[c] = a_sum, dd[c] = d_sum;
    }
  }

  void backward(float *rows, const float *states, const float *us, const float *zeros, const float *gy,
                const Sums &to) const {
    const int64_t n = count();
    vec fixed[V ? R * V : 1], *G = V ? fixed : vectors(rows);
    if (V) std::copy_n(vectors(rows), R * V, fixed);
    for (int64_t t = steps - 1; t >= 0; --t) {
      float g[R];
      after(G, t, vectors(states + (t + 1) * R * width), scalars(gy, t), to, g);
      before(G, t, vectors(x.begin(t) ? zeros : states + t * R * width), us + t * R, g, to);
      if (x.begin(t)) std::fill_n(G, R * n, vec{});  // the zero state does not depend on what came before
    }
    if (V) std::copy_n(fixed, R * V, vectors(rows));
  }
};

// Calls body with Rows<V> for the rows from `first` on.
template <class Body> void with_rows(const Steps &x, const Wkv7Shape &s, int64_t first, int64_t steps, const Body &body) {
  if (s.width() == 64 && LANES == 16)
    body(Rows<64 / LANES>{x, s.width(), first, steps});
  else if (s.width() == 32 && LANES >= 8)
    body(Rows<32 / LANES>{x, s.width(), first, steps});
  else
    body(Rows<0>{x, s.width(), first, steps});
}

}  // namespace

int64_t wkv7_forward_scratch(const Wkv7Shape &s) { return (7 * s.steps() + s.rows + 1) * s.width(); }

template <class S>
void wkv7_forward(const Wkv7Shape &s, const Wkv7Forward<S> &p, float *scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    Memory memory(scratch);
    Steps x(s, memory);
    float *y = memory.take(s.steps() * s.width()), *state = memory.take(s.rows * s.width());
    const int64_t from = task % s.ranges() * s.rows, to = std::min(from + s.rows, s.N);
    over_chunks(s, task / s.ranges(), false, [&](const Chunk &at) {
      if (at.begin == 0) read_rows(s, p.in.state + at.state(), from, s.rows, state);
      x.read_from(at, p.in);
      for (int64_t first = from; first < to; first += R)
        with_rows(x, s, first, at.steps(),
                  [&](const auto &rows) { rows.forward(state + (first - from) * s.width(), y); });
      for (int64_t t = at.begin; t < at.end; ++t)
        for (int64_t i = from; i < to; ++i) store(p.y + at.in(t) + i, y[(t - at.begin) * s.width() + i]);
      const Chunk next{s, at.b, at.h, at.end, at.end};
      write_rows(s, state, from, s.rows, at.end == s.T ? p.new_state + at.state() : p.saved + next.saved());
    });
  }
}

int64_t wkv7_backward_scratch(const Wkv7Shape &s) {
  return (13 * s.steps() + s.N + R + (s.steps() + 3) * R + 1) * s.width() + s.steps() * R + LANES;
}

template <class S>
void wkv7_backward(const Wkv7Shape &s, const Wkv7Backward<S> &p, float *scratch, int64_t begin, int64_t end) {
  const int64_t chunk_floats = s.steps() * s.width();
  for (int64_t head = begin; head < end; ++head) {
    Memory memory(scratch);
    Steps x(s, memory);
    float *gy = memory.take(chunk_floats), *G = memory.take((s.N + R) * s.width());
    float *states = memory.take((s.steps() + 1) * R * s.width()), *us = memory.take(s.steps() * R);
    const float *zeros = memory.take(R * s.width());
    float *sums[6];
    for (float *&sum : sums) sum = memory.take(chunk_floats);
    auto [dr, dd, dk, dv, da, db] = sums;
    over_chunks(s, head, true, [&](const Chunk &at) {
      if (at.end == s.T && p.gstate) read_rows(s, p.gstate + at.state(), 0, s.N, G);
      x.read_from(at, p.in), read(at, p.gy, gy);
      for (float *sum : sums) std::fill_n(sum, chunk_floats, 0.0f);
      const float *before = at.begin == 0 ? p.in.state + at.state() : p.saved + at.saved();
      for (int64_t first = 0; first < s.N; first += R) {
        read_rows(s, before, first, R, states);
        with_rows(x, s, first, at.steps(), [&](const auto &rows) {
          rows.recompute(states, us, zeros);
          rows.backward(G + first * s.width(), states, us, zeros, gy, {dr, dd, dk, dv, da, db});
        });
      }
      for (int64_t i = 0; i < chunk_floats; ++i) dd[i] *= x.d[i];
      write(at, dr, p.dr), write(at, dd, p.dw), write(at, dk, p.dk), write(at, dv, p.dv);
      write(at, da, p.da), write(at, db, p.db);
    });
    write_rows(s, G, 0, s.N, p.dstate + head * s.N * s.N);
  }
}

template void wkv7_forward(const Wkv7Shape &, const Wkv7Forward<float> &, float *, int64_t, int64_t);
template void wkv7_forward(const Wkv7Shape &, const Wkv7Forward<bf16> &, float *, int64_t, int64_t);
template void wkv7_backward(const Wkv7Shape &, const Wkv7Backward<float> &, float *, int64_t, int64_t);
template void wkv7_backward(const Wkv7Shape &, const Wkv7Backward<bf16> &, float *, int64_t, int64_t);

}  // namespace rwkv
