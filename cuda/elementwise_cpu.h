// The CPU kernels of the element-wise family: arguments, declarations, and what forward and backward of shift_mix share.
#pragma once

#include <type_traits>

#include "cpu.h"

namespace rwkv {

// shift_mix: out_i = x_t μ_i + x_(t-1) (1 - μ_i) for `count` mixes. A task is one sequence × a block of MIX_ROWS steps.
constexpr int64_t MIX_ROWS = 64, MAX_MIXES = 8;

template <class S> struct ShiftMix {
  int64_t B, T, C, count;
  const S *x, *previous;          // (B, T, C); (B, C) or null for zeros
  const float *mix[MAX_MIXES];    // (C) each
  S *out[MAX_MIXES];              // forward: the outputs; backward: unused
  const S *grad[MAX_MIXES];       // backward: gradients of the outputs
  S *dx, *dprevious;              // dprevious may be null
  float *dmix;                    // (tasks, count, C), to be summed over the tasks
  const bool *starts = nullptr;   // (B, T) where a document begins: the row before it counts as zeros
  bool begins(int64_t b, int64_t t) const { return starts && starts[b * T + t]; }
  int64_t blocks() const { return (T + MIX_ROWS - 1) / MIX_ROWS; }
  int64_t tasks() const { return B * blocks(); }
};

template <class S> void shift_mix_forward(const ShiftMix<S> &, int64_t begin, int64_t end);
// `carry` holds C floats that no other thread touches.
template <class S> void shift_mix_backward(const ShiftMix<S> &, float *carry, int64_t begin, int64_t end);

// Element-wise on [begin, end): h = relu(k)^2 and, from h and its gradient, the gradient of k; o = σ(r) y and back.
template <class S> void relu_squared_forward(const S *k, S *h, int64_t begin, int64_t end);
template <class S> void relu_squared_backward(const S *h, const S *gh, S *dk, int64_t begin, int64_t end);
template <class S> void sigmoid_gate_forward(const S *r, const S *y, S *o, int64_t begin, int64_t end);
template <class S>
void sigmoid_gate_backward(const S *r, const S *y, const S *go, S *dr, S *dy, int64_t begin, int64_t end);

// The row before row t of sequence b: of x, or `previous` for t = 0; null, which is zeros, where a document begins.
template <class S> const S *row_before(const ShiftMix<S> &a, int64_t b, int64_t t) {
  if (a.begins(b, t)) return nullptr;
  if (t > 0) return a.x + (b * a.T + t - 1) * a.C;
  return a.previous ? a.previous + b * a.C : nullptr;
}

template <class S> inline float load_or_zero(const S *row, int64_t c) { return row ? load(row[c]) : 0.0f; }

// The loops below take the number of mixes as a constant: a channel's loads serve all of them, in registers.
template <class Body> void with_count(int64_t count, const Body &body) {
  static_assert(MAX_MIXES == 8);
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

}  // namespace rwkv
