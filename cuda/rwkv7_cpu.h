// The CPU kernels of the element-wise parts of RWKV-7's time mix: arguments and declarations.
#pragma once

#include "cpu.h"

namespace rwkv {

constexpr int64_t RWKV7_ROWS = 64;              // tokens of a task
constexpr float RWKV7_LOG_DECAY = -0.60653066f;  // -e^(-1/2): logarithm of the fastest decay
constexpr float RWKV7_MIN_NORM = 1e-12f;         // of the vector that is divided by its norm

inline int64_t rwkv7_tasks(int64_t rows) { return (rows + RWKV7_ROWS - 1) / RWKV7_ROWS; }

// Per head of N channels, with α = σ(a0 + Δa) and κ = (k ⊙ k_k) / |k ⊙ k_k|:
//   w = LOG_DECAY σ(w0 + Δw),  k' = k ⊙ (1 + (α - 1) ⊙ k_a),  a = -κ,  b = κ ⊙ α
template <class S> struct Rwkv7Keys {
  int64_t rows, C, N;                    // rows: B · T tokens
  const S *k, *w_delta, *a_delta;        // (rows, C)
  const float *w0, *a0, *k_k, *k_a;      // (C)
  float *w = nullptr;                    // forward: the results, (rows, C)
  S *new_k = nullptr, *a = nullptr, *b = nullptr;
  const float *gw = nullptr;             // backward: their gradients
  const S *gk = nullptr, *ga = nullptr, *gb = nullptr;
  S *dk = nullptr, *dw_delta = nullptr, *da_delta = nullptr;
  float *sums = nullptr;                 // (tasks, 4, C): gradients of w0, a0, k_k, k_a, to be summed over the tasks
};

template <class S> void rwkv7_keys_forward(const Rwkv7Keys<S> &, int64_t begin, int64_t end);
template <class S> void rwkv7_keys_backward(const Rwkv7Keys<S> &, int64_t begin, int64_t end);

// v' = v + σ(v0 + Δv) ⊙ (v_first - v)
template <class S> struct Rwkv7Values {
  int64_t rows, C;
  const S *v, *v_first, *v_delta;        // (rows, C)
  const float *v0;                       // (C)
  S *out = nullptr;                      // forward
  const S *gout = nullptr;               // backward
  S *dv = nullptr, *dv_first = nullptr, *dv_delta = nullptr;
  float *sums = nullptr;                 // (tasks, C): gradient of v0
};

template <class S> void rwkv7_values_forward(const Rwkv7Values<S> &, int64_t begin, int64_t end);
template <class S> void rwkv7_values_backward(const Rwkv7Values<S> &, int64_t begin, int64_t end);

}  // namespace rwkv
