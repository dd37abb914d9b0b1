// The CPU kernels of wkv4: arguments and declarations.
#pragma once

#include "cpu.h"

namespace rwkv {

// wkv4: B sequences of T steps and C channels. A task is one sequence × one range of `width` channels; it
// runs through time in chunks, and through a chunk in blocks of at most WKV4_LANES channels, whose states fit into the
// first-level cache.
constexpr int64_t WKV4_LANES = 64;

struct Wkv4Shape {
  int64_t B, T, C, chunk, width;
  int64_t ranges() const { return (C + width - 1) / width; }
  int64_t tasks() const { return B * ranges(); }
  int64_t saved() const { return (T - 1) / chunk; }  // states, one before each chunk but the first, which the caller has
};

template <class S> struct Wkv4Forward {
  const float *w, *u;           // (C)
  const S *k, *v;               // (B, T, C)
  const float *state;           // (B, 3, C)
  S *y;                         // (B, T, C)
  float *new_state, *saved;     // (B, 3, C), (B, saved(), 3, C)
  const bool *starts = nullptr; // (B, T) where a document begins: the state before it is the empty one
};

template <class S> struct Wkv4Backward {
  const float *w, *u;
  const S *k, *v;
  const float *state, *saved;
  const S *gy;                  // gradient of y
  const float *gstate;          // of new_state, or null
  S *dk, *dv;
  float *dw, *du, *dstate;      // dw, du: (B, C), to be summed over B
  const bool *starts = nullptr;
};

template <class S> void wkv4_forward(const Wkv4Shape &, const Wkv4Forward<S> &, int64_t begin, int64_t end);
// `scratch` holds wkv4_scratch(shape) floats that no other thread touches.
template <class S>
void wkv4_backward(const Wkv4Shape &, const Wkv4Backward<S> &, float *scratch, int64_t begin, int64_t end);
inline int64_t wkv4_scratch(const Wkv4Shape &s) { return 5 * s.chunk * WKV4_LANES; }

}  // namespace rwkv
