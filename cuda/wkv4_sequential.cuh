// wkv4 one step after the other: a thread takes V neighbouring channels through all of time.
#pragma once

#include "wkv4.cuh"

namespace rwkv {
namespace {


// A thread's sequence and first channel; false after the last one.
template <int V> __device__ __forceinline__ bool alone(const Inputs &a, Position *at) {
  const int64_t thread = int64_t(blockIdx.x) * ALONE + threadIdx.x, columns = (a.C + V - 1) / V;
  *at = {thread / columns, thread % columns * V, 0, thread < a.B * columns};
  return at->inside;
}

template <class S, int V> __global__ __launch_bounds__(ALONE) void wkv4_forward_sequential_kernel(const __grid_constant__ Forward a) {
  Position at;
  if (!alone<V>(a, &at)) return;
  const int64_t C = a.C, rows = at.b * a.T * C + at.c, states = at.b * 3 * C + at.c;
  State s[V];
  float w[V], u[V];
#pragma unroll
  for (int i = 0; i < V; ++i) s[i] = read_state(a.state, states + i, C), w[i] = a.w[at.c + i], u[i] = a.u[at.c + i];
  Pack<S, V> k[STEPS] = {}, v[STEPS] = {}, next_k[STEPS] = {}, next_v[STEPS] = {};
  int count = steps_of(a.T);
  load_steps<S, V, false>(k, a.k, rows, C, count), load_steps<S, V, false>(v, a.v, rows, C, count);
  for (int64_t t = 0; t < a.T; t += STEPS) {
    const int64_t next_at = rows + (t + STEPS) * C;
    const int ahead = steps_of(a.T - t - STEPS);
    load_steps<S, V, false>(next_k, a.k, next_at, C, ahead), load_steps<S, V, false>(next_v, a.v, next_at, C, ahead);
    if (t > 0 && t % CHUNK == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        write_state(a.saved, (at.b * (a.chunks() - 1) + t / CHUNK - 1) * 3 * C + at.c + i, C, s[i]);
    }
    go_forward<false, S, V>(k, v, count, w, u, s, static_cast<S *>(a.y) + rows + t * C, C);
    count = ahead;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) k[j] = next_k[j], v[j] = next_v[j];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) write_state(a.new_state, states + i, C, s[i]);
}

// Chunk by chunk from the end; a chunk in eighths: their first states are kept in shared memory, the states of one eighth
// in registers.
template <class S, int V> __global__ __launch_bounds__(ALONE, sizeof(S) == 2 ? 6 : 4) void wkv4_backward_sequential_kernel(const __grid_constant__ Backward a) {
  __shared__ float eighth[WARPS][3][V][ALONE];  // a column belongs to one thread: no barrier is needed
  Position at;
  if (!alone<V>(a, &at)) return;
  const int me = threadIdx.x;
  const int64_t C = a.C, rows = at.b * a.T * C + at.c, states = at.b * 3 * C + at.c;
  float w[V], u[V], bonus[V], dw[V] = {}, du[V] = {};
  Gradient g[V];
#pragma unroll
  for (int i = 0; i < V; ++i) w[i] = a.w[at.c + i], u[i] = a.u[at.c + i];
  const bool plain = near<V>(w, u, bonus) && !a.gstate;
  for (int64_t chunk = a.chunks() - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * CHUNK;
    const int steps = int(a.T - begin < CHUNK ? a.T - begin : CHUNK), parts = (steps + STEPS - 1) / STEPS;
    State s[V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      s[i] = chunk == 0 ? read_state(a.state, states + i, C)
                        : read_state(a.saved, (at.b * (a.chunks() - 1) + chunk - 1) * 3 * C + at.c + i, C);
    Pack<S, V> k[STEPS] = {}, v[STEPS] = {}, gy[STEPS] = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int64_t row = rows + (begin + part * STEPS) * C;
      const int count = steps - part * STEPS;
      load_steps<S, V>(k, a.k, row, C, count), load_steps<S, V>(v, a.v, row, C, count);
#pragma unroll
      for (int i = 0; i < V; ++i)
        eighth[part][0][i][me] = s[i].n, eighth[part][1][i][me] = s[i].d, eighth[part][2][i][me] = s[i].p;
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        if (j < count) {
          float kj[V], vj[V];
          unpack<S, V>(k[j], kj), unpack<S, V>(v[j], vj);
          prefetch(static_cast<const S *>(a.gy) + row + j * C);
#pragma unroll
          for (int i = 0; i < V; ++i) s[i] = step(s[i], w[i], kj[i], vj[i]);
        }
      }
    }
    float dw_chunk[V] = {}, du_chunk[V] = {};  // a sum of sums rounds less
    if (chunk == a.chunks() - 1) {
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = at_the_end(a.gstate, states + i, C, s[i]);
    }
#pragma unroll 1
    for (int part = parts - 1; part >= 0; --part) {
      const int64_t row = rows + (begin + part * STEPS) * C;
      const int count = steps - part * STEPS;
      load_steps<S, V>(k, a.k, row, C, count), load_steps<S, V>(v, a.v, row, C, count);
      load_steps<S, V>(gy, a.gy, row, C, count);
      State before[STEPS / 2][V];
#pragma unroll
      for (int i = 0; i < V; ++i) s[i] = {eighth[part][0][i][me], eighth[part][1][i][me], eighth[part][2][i][me]};
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        if (j < count) {
          float kj[V], vj[V];
          unpack<S, V>(k[j], kj), unpack<S, V>(v[j], vj);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (j % 2 == 0) before[j / 2][i] = s[i];
            if (j < STEPS - 2) s[i] = step(s[i], w[i], kj[i], vj[i]);
          }
        }
      }
      S *dk = static_cast<S *>(a.dk) + row, *dv = static_cast<S *>(a.dv) + row;
      if (plain && count >= STEPS) go_back<true, S, V>(k, v, gy, before, count, w, bonus, g, dw_chunk, du_chunk, dk, dv, C);
      else go_back<false, S, V>(k, v, gy, before, count, w, u, g, dw_chunk, du_chunk, dk, dv, C);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) dw[i] += dw_chunk[i], du[i] += du_chunk[i];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    write_dstate(a.dstate, states + i, C, read_state(a.state, states + i, C), g[i]);
    a.parts[at.b * C + at.c + i] = dw[i], a.parts[(a.B + at.b) * C + at.c + i] = du[i];
  }
}

}  // namespace
}  // namespace rwkv
