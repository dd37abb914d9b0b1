// The CPU kernels of wkv7: arguments and declarations.
#pragma once

#include "cpu.h"
#include "vectors_cpu.h"

namespace rwkv {

constexpr int64_t WKV7_ROWS = 4;  // rows of the state that go through a chunk together

// wkv7: B sequences of T steps, H heads with a state of N × N. A forward task is `rows` value rows of the state of one
// sequence and head, a multiple of WKV7_ROWS; a backward task is the whole state. It goes through time in chunks.
struct Wkv7Shape {
  int64_t B, T, H, N, chunk, rows;
  int64_t heads() const { return B * H; }
  int64_t ranges() const { return (N + rows - 1) / rows; }
  int64_t steps() const { return chunk < T ? chunk : T; }        // of the longest chunk
  int64_t width() const { return (N + LANES - 1) / LANES * LANES; }  // of a row in scratch memory
  int64_t saved() const { return (T - 1) / chunk; }  // states, one before each chunk but the first, which the caller has
};

template <class S> struct Wkv7Inputs {
  const S *r;                   // (B, T, H, N); likewise k, v, a, b
  const float *w;               // (B, T, H, N)
  const S *k, *v, *a, *b;
  const float *state;           // (B, H, N, N)
  const bool *starts = nullptr; // (B, T) where a document begins: the state before it is zero
};

template <class S> struct Wkv7Forward {
  Wkv7Inputs<S> in;
  S *y;                         // (B, T, H, N)
  float *new_state, *saved;     // (B, H, N, N), (B, saved(), H, N, N)
};

template <class S> struct Wkv7Backward {
  Wkv7Inputs<S> in;
  const float *saved;
  const S *gy;                  // gradient of y
  const float *gstate;          // of new_state, or null
  S *dr;
  float *dw;
  S *dk, *dv, *da, *db;
  float *dstate;
};

// `scratch` holds wkv7_…_scratch(shape) floats that no other thread touches.
template <class S>
void wkv7_forward(const Wkv7Shape &, const Wkv7Forward<S> &, float *scratch, int64_t begin, int64_t end);
template <class S>
void wkv7_backward(const Wkv7Shape &, const Wkv7Backward<S> &, float *scratch, int64_t begin, int64_t end);
int64_t wkv7_forward_scratch(const Wkv7Shape &);
int64_t wkv7_backward_scratch(const Wkv7Shape &);

}  // namespace rwkv
