// wkv4 parallel in time. A block takes 32 V channels, its 8 warps take 8 steps each of a chunk of 64. The recurrence is
// associative: a warp summarises its steps as the state that they give from the empty one; each warp then combines
// the summaries before its own and runs its steps again, from registers, from the right state. Where there are fewer blocks
// than the GPU can hold, time is cut into segments as well: a first launch summarises each segment, a second scans
// the summaries by warp shuffles, a third does the work.
#pragma once

#include "wkv4.cuh"

namespace rwkv {
namespace {

// A block of the parallel kernels; `segments` of them are launched.
template <int V> __device__ __forceinline__ Position position(int64_t C, int64_t segments) {
  const int64_t columns = (C + LANES * V - 1) / (LANES * V), block = blockIdx.x;
  const int64_t c = block % columns * (LANES * V) + threadIdx.x * V;
  return {block / columns / segments, c, int(block / columns % segments), c < C};
}


constexpr int WIDTH = 2 * LANES;  // the largest number of channels of a block

// SUMMARY: only the state that a segment gives from the empty one, for all segments but the last.
template <class S, int V, bool SUMMARY> __global__ __launch_bounds__(LANES * WARPS) void wkv4_forward_kernel(const __grid_constant__ Forward a) {
  __shared__ float part[2][WARPS][3][WIDTH], carry[2][3][WIDTH];
  const int warp = threadIdx.y, lane = threadIdx.x;
  const Position at = position<V>(a.C, SUMMARY ? a.segments - 1 : a.segments);
  const int first = int(a.first_chunk(at.segment)), last = int(a.first_chunk(at.segment + 1));
  const int64_t C = a.C;
  const int64_t rows = at.b * a.T * C + at.c, states = at.b * 3 * C + at.c;
  float w[V] = {}, u[V] = {}, bonus[V];
  if (at.inside) {
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = a.w[at.c + i], u[i] = a.u[at.c + i];
  }
  const bool plain = near<V>(w, u, bonus);
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      State s = empty();
      if (!SUMMARY && at.inside)
        s = at.segment == 0 ? read_state(a.state, states + i, C)
                            : read_state(a.starts, (at.b * a.segments + at.segment) * 3 * C + at.c + i, C);
      carry[0][0][i * LANES + lane] = s.n, carry[0][1][i * LANES + lane] = s.d, carry[0][2][i * LANES + lane] = s.p;
    }
  }
  Pack<S, V> k[STEPS] = {}, v[STEPS] = {}, next_k[STEPS] = {}, next_v[STEPS] = {};
  int64_t t = int64_t(first) * CHUNK + warp * STEPS;
  int count = at.inside ? steps_of(a.T - t) : 0;
  load_steps<S, V>(k, a.k, rows + t * C, C, count), load_steps<S, V>(v, a.v, rows + t * C, C, count);
  for (int chunk = first; chunk < last; ++chunk, t += CHUNK) {
    const int now = (chunk - first) & 1;  // part and carry alternate: one barrier a chunk is enough
    const int ahead = at.inside && chunk + 1 < last ? steps_of(a.T - t - CHUNK) : 0;
    const int64_t next_at = rows + (t + CHUNK) * C;
    load_steps<S, V>(next_k, a.k, next_at, C, ahead), load_steps<S, V>(next_v, a.v, next_at, C, ahead);
    State local[V], s[V];
    summarise<S, V>(k, v, w, local);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float(*to)[WIDTH] = part[now][warp];
      to[0][i * LANES + lane] = local[i].n, to[1][i * LANES + lane] = local[i].d, to[2][i * LANES + lane] = local[i].p;
    }
    __syncthreads();
    if (!SUMMARY || warp == WARPS - 1) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        s[i] = {carry[now][0][i * LANES + lane], carry[now][1][i * LANES + lane], carry[now][2][i * LANES + lane]};
#pragma unroll 1
      for (int other = 0; other < warp; ++other) {  // the steps of the warps before this one are all there
        float(*from)[WIDTH] = part[now][other];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int x = i * LANES + lane;
          s[i] = then(s[i], {from[0][x], from[1][x], from[2][x]}, STEPS * w[i]);
        }
      }
    }
    if (warp == WARPS - 1 && chunk + 1 < a.chunks()) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const State end = then(s[i], local[i], STEPS * w[i]);
        float(*to)[WIDTH] = carry[1 - now];
        to[0][i * LANES + lane] = end.n, to[1][i * LANES + lane] = end.d, to[2][i * LANES + lane] = end.p;
        if (!SUMMARY && at.inside) write_state(a.saved, (at.b * (a.chunks() - 1) + chunk) * 3 * C + at.c + i, C, end);
        if (SUMMARY && at.inside && chunk + 1 == last)
          write_state(a.summaries, (at.b * a.segments + at.segment) * 3 * C + at.c + i, C, end);
      }
    }
    if (!SUMMARY) {
      S *y = static_cast<S *>(a.y) + rows + t * C;
      if (plain && count >= STEPS) go_forward<true, S, V>(k, v, count, w, bonus, s, y, C);
      else go_forward<false, S, V>(k, v, count, w, u, s, y, C);
      if (count > 0 && count <= STEPS) {  // the last step of all is this thread's
#pragma unroll
        for (int i = 0; i < V; ++i) write_state(a.new_state, states + i, C, s[i]);
      }
    }
    count = ahead;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) k[j] = next_k[j], v[j] = next_v[j];
  }
}

// How STEPS steps map the gradient of the state after them, and the states before the even ones; s becomes the state
// after them.
template <bool PLAIN, class S, int V>
__device__ __forceinline__ void map_steps(const Pack<S, V> *k, const Pack<S, V> *v, const Pack<S, V> *gy, int count,
                                          const float *w, const float *u, State *s, State (*before)[V], Map *steps) {
#pragma unroll
  for (int i = 0; i < V; ++i) steps[i] = {1.f, 1.f, 0.f, 0.f};
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    if (PLAIN || j < count) {
      float kj[V], vj[V], gj[V];
      unpack<S, V>(k[j], kj), unpack<S, V>(v[j], vj), unpack<S, V>(gy[j], gj);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float decayed = s[i].p + w[i];
        const Weights next = weigh(decayed, kj[i]);
        const Output out = output<PLAIN>(s[i], next, u[i], kj[i], vj[i]);
        const float slope = out.e.past * gj[i] * out.inverse, keep = PLAIN ? 1.f : kept(decayed, kj[i]);
        if (j % 2 == 0) before[j / 2][i] = s[i];
        steps[i] = compose(steps[i], {next.past, keep, slope, -slope * out.y});
        s[i] = step(s[i], w[i], kj[i], vj[i]);
      }
    }
  }
}

// SUMMARY: only how a segment maps a gradient, for all segments but the first.
template <class S, int V, bool SUMMARY>
__global__ __launch_bounds__(LANES * WARPS, sizeof(S) == 2 ? 2 : 1) void wkv4_backward_kernel(const __grid_constant__ Backward a) {
  __shared__ float part[WARPS][3][WIDTH], map[WARPS][4][WIDTH], carry[2][3][WIDTH];
  __shared__ float slopes[WARPS][2][WIDTH];  // of w and u: a column belongs to one thread until the end
  const int warp = threadIdx.y, lane = threadIdx.x;
  const Position at = position<V>(a.C, SUMMARY ? a.segments - 1 : a.segments);
  const int segment = SUMMARY ? at.segment + 1 : at.segment;
  const int first = int(a.first_chunk(segment)), last = int(a.first_chunk(segment + 1));
  const int64_t C = a.C;
  const int64_t rows = at.b * a.T * C + at.c, states = at.b * 3 * C + at.c;
  float w[V] = {}, u[V] = {}, bonus[V], factor[V], keep[V];
  Gradient g[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    factor[i] = keep[i] = 1.f;
    slopes[warp][0][i * LANES + lane] = slopes[warp][1][i * LANES + lane] = 0.f;
  }
  if (at.inside) {
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = a.w[at.c + i], u[i] = a.u[at.c + i];
  }
  const bool plain = near<V>(w, u, bonus) && !a.gstate;
  if (warp == 0) {  // in the last segment the thread with the last step fills it in
#pragma unroll
    for (int i = 0; i < V; ++i) {
      State after = {0.f, 0.f, 0.f};
      if (!SUMMARY && at.inside && segment + 1 < a.segments) after =
            read_state(a.ends, (at.b * a.segments + segment) * 3 * C + at.c + i, C);
      float(*to)[WIDTH] = carry[0];
      to[0][i * LANES + lane] = after.n, to[1][i * LANES + lane] = after.d, to[2][i * LANES + lane] = after.p;
    }
  }
  for (int chunk = last - 1; chunk >= first; --chunk) {
    const int now = (last - 1 - chunk) & 1;
    const int64_t t = int64_t(chunk) * CHUNK + warp * STEPS;
    const int count = at.inside ? steps_of(a.T - t) : 0;
    Pack<S, V> k[STEPS] = {}, v[STEPS] = {}, gy[STEPS] = {};
    load_steps<S, V>(k, a.k, rows + t * C, C, count), load_steps<S, V>(v, a.v, rows + t * C, C, count);
    load_steps<S, V>(gy, a.gy, rows + t * C, C, count);
    State s[V], local[V], before[STEPS / 2][V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      s[i] = empty();
      if (at.inside)
        s[i] = chunk == 0 ? read_state(a.state, states + i, C)
                          : read_state(a.saved, (at.b * (a.chunks() - 1) + chunk - 1) * 3 * C + at.c + i, C);
    }
    if (chunk > first && lane < 3 * STEPS) {  // a lane prefetches a row of one tensor: one cache line, two in float32
      const void *from = lane < STEPS ? a.k : lane < 2 * STEPS ? a.v : a.gy;
      const S *row = static_cast<const S *>(from) + rows - lane * V + (t - CHUNK + lane % STEPS) * C;
      prefetch(row);
      if (sizeof(S) * V * LANES > 128) prefetch(row + V * LANES / 2);
    }
    summarise<S, V>(k, v, w, local);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int x = i * LANES + lane;
      part[warp][0][x] = local[i].n, part[warp][1][x] = local[i].d, part[warp][2][x] = local[i].p;
    }
    __syncthreads();
#pragma unroll 1
    for (int other = 0; other < warp; ++other) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int x = i * LANES + lane;
        s[i] = then(s[i], {part[other][0][x], part[other][1][x], part[other][2][x]}, STEPS * w[i]);
      }
    }
    Map steps[V];
    if (plain && count >= STEPS) map_steps<true, S, V>(k, v, gy, count, w, bonus, s, before, steps);
    else map_steps<false, S, V>(k, v, gy, count, w, u, s, before, steps);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int x = i * LANES + lane;
      map[warp][0][x] = steps[i].factor, map[warp][1][x] = steps[i].keep;
      map[warp][2][x] = steps[i].n, map[warp][3][x] = steps[i].d;
      if (count > 0 && count <= STEPS) {  // the last step of all
        const Gradient end = at_the_end(a.gstate, states + i, C, s[i]);
        carry[0][0][x] = end.n, carry[0][1][x] = end.d, carry[0][2][x] = end.q;
      }
    }
    __syncthreads();
    if (!SUMMARY || warp == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int x = i * LANES + lane;
        g[i] = {carry[now][0][x], carry[now][1][x], carry[now][2][x]};
      }
#pragma unroll 1
      for (int other = WARPS - 1; other > warp - SUMMARY; --other) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int x = i * LANES + lane;
          const Map m = {map[other][0][x], map[other][1][x], map[other][2][x], map[other][3][x]};
          g[i] = through(m, g[i]);
          if (SUMMARY) factor[i] *= m.factor, keep[i] *= m.keep;
        }
      }
    }
    if (!SUMMARY) {
      const int64_t row = rows + t * C;
      float dw[V] = {}, du[V] = {};
      S *dk = static_cast<S *>(a.dk) + row, *dv = static_cast<S *>(a.dv) + row;
      if (plain && count >= STEPS) go_back<true, S, V>(k, v, gy, before, count, w, bonus, g, dw, du, dk, dv, C);
      else go_back<false, S, V>(k, v, gy, before, count, w, u, g, dw, du, dk, dv, C);
#pragma unroll
      for (int i = 0; i < V; ++i)
        slopes[warp][0][i * LANES + lane] += dw[i], slopes[warp][1][i * LANES + lane] += du[i];
    }
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int x = i * LANES + lane;
        carry[1 - now][0][x] = g[i].n, carry[1 - now][1][x] = g[i].d, carry[1 - now][2][x] = g[i].q;
      }
    }
  }
  if (SUMMARY) {
    if (warp == 0 && at.inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float *to = a.maps + (at.b * a.segments + segment) * 5 * C + at.c + i;
        to[0] = factor[i], to[C] = keep[i], to[2 * C] = g[i].n, to[3 * C] = g[i].d, to[4 * C] = g[i].q;
      }
    }
    return;
  }
  if (warp == 0 && at.inside && segment == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      write_dstate(a.dstate, states + i, C, read_state(a.state, states + i, C), g[i]);
  }
  __syncthreads();
  if (warp == 0 && at.inside) {
    const int64_t blocks = a.B * a.segments, block = at.b * a.segments + segment;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float dw_sum = 0.f, du_sum = 0.f;
      for (int other = 0; other < WARPS; ++other)
        dw_sum += slopes[other][0][i * LANES + lane], du_sum += slopes[other][1][i * LANES + lane];
      a.parts[block * C + at.c + i] = dw_sum;
      a.parts[(blocks + block) * C + at.c + i] = du_sum;
    }
  }
}

// ---- between segments: a warp a channel, a lane a segment --------------------------------------------------------

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ State shift_up(State s, int lanes) {
  return {__shfl_up_sync(ALL, s.n, lanes), __shfl_up_sync(ALL, s.d, lanes), __shfl_up_sync(ALL, s.p, lanes)};
}

__device__ __forceinline__ Map shift_up(Map m, int lanes) {
  return {__shfl_up_sync(ALL, m.factor, lanes), __shfl_up_sync(ALL, m.keep, lanes), __shfl_up_sync(ALL, m.n, lanes),
          __shfl_up_sync(ALL, m.d, lanes)};
}

// starts[s] for s > 0: the state, then the segments before s.
__global__ __launch_bounds__(LANES * WARPS) void wkv4_starts_kernel(const __grid_constant__ Forward a) {
  const int64_t channel = int64_t(blockIdx.x) * WARPS + threadIdx.y, b = channel / a.C, c = channel % a.C;
  if (b >= a.B) return;  // for all lanes of a warp
  const int lane = threadIdx.x;
  const float w = a.w[c];
  State carry = read_state(a.state, b * 3 * a.C + c, a.C);
  for (int64_t base = 0; base < a.segments - 1; base += LANES) {
    const int64_t segment = base + lane;
    State s = empty();
    float decay = 0.f;
    if (segment < a.segments - 1) {
      s = read_state(a.summaries, (b * a.segments + segment) * 3 * a.C + c, a.C);
      decay = float((a.first_chunk(segment + 1) - a.first_chunk(segment)) * CHUNK) * w;
    }
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
      const State before = shift_up(s, distance);
      const float more = __shfl_up_sync(ALL, decay, distance);
      if (lane >= distance) s = then(before, s, decay), decay += more;
    }
    s = then(carry, s, decay);
    if (segment < a.segments - 1) write_state(a.starts, (b * a.segments + segment + 1) * 3 * a.C + c, a.C, s);
    carry = {__shfl_sync(ALL, s.n, LANES - 1), __shfl_sync(ALL, s.d, LANES - 1), __shfl_sync(ALL, s.p, LANES - 1)};
  }
}

// ends[s] for s < segments - 1: the gradient after segment s, from the maps of the segments after it.
__global__ __launch_bounds__(LANES * WARPS) void wkv4_ends_kernel(const __grid_constant__ Backward a) {
  const int64_t channel = int64_t(blockIdx.x) * WARPS + threadIdx.y, b = channel / a.C, c = channel % a.C;
  if (b >= a.B) return;
  const int lane = threadIdx.x;
  Gradient carry = {0.f, 0.f, 0.f};  // the last segment's map contains the gradient of new_state
  for (int64_t base = 0; base < a.segments - 1; base += LANES) {
    const int64_t segment = a.segments - 1 - base - lane;  // lane by lane back in time
    Map m = {1.f, 1.f, 0.f, 0.f};
    float q = 0.f;  // of the last segment only
    if (segment > 0) {
      const float *from = a.maps + (b * a.segments + segment) * 5 * a.C + c;
      m = {from[0], from[a.C], from[2 * a.C], from[3 * a.C]};
      q = segment == a.segments - 1 ? from[4 * a.C] : 0.f;
    }
    if (segment == a.segments - 1) m.keep = 1.f;  // its own is in q
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
      const Map later = shift_up(m, distance);
      if (lane >= distance) m = compose(m, later);
    }
    if (base == 0) carry.q = __shfl_sync(ALL, q, 0);
    const Gradient g = through(m, carry);
    if (segment > 0) {
      float *to = a.ends + (b * a.segments + segment - 1) * 3 * a.C + c;
      to[0] = g.n, to[a.C] = g.d, to[2 * a.C] = g.q;
    }
    carry = {__shfl_sync(ALL, g.n, LANES - 1), __shfl_sync(ALL, g.d, LANES - 1), __shfl_sync(ALL, g.q, LANES - 1)};
  }
}

}  // namespace
}  // namespace rwkv
