// The CPU kernels of head_norm: arguments and declarations.
#pragma once

#include "cpu.h"

namespace rwkv {

constexpr int64_t HEAD_NORM_ROWS = 64;  // tokens of a task

// Per head of N channels: o = (norm(y) ⊙ weight + bias + (Σ_n r k r_k) v) ⊙ gate, where norm(y) has mean 0, variance 1.
template <class S> struct HeadNorm {
  int64_t rows, C, N;                    // rows: B · T tokens
  float eps;                             // added to the variance
  const S *y, *gate;                     // (rows, C)
  const float *weight, *bias;            // (C)
  const S *r = nullptr, *k = nullptr, *v = nullptr;  // (rows, C), or null: without the second term
  const float *r_k = nullptr;            // (C)
  S *out = nullptr;                      // forward
  const S *gout = nullptr;               // backward
  S *dy = nullptr, *dgate = nullptr, *dr = nullptr, *dk = nullptr, *dv = nullptr;
  float *sums = nullptr;                 // (tasks, 3, C): gradients of weight, bias and r_k, to be summed over the tasks
  int64_t tasks() const { return (rows + HEAD_NORM_ROWS - 1) / HEAD_NORM_ROWS; }
};

template <class S> void head_norm_forward(const HeadNorm<S> &, int64_t begin, int64_t end);
template <class S> void head_norm_backward(const HeadNorm<S> &, int64_t begin, int64_t end);

}  // namespace rwkv
