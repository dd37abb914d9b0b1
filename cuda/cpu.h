// What the CPU kernels share: storage types, one vectorisable exponential, and the kernels' declarations.
// Free of torch headers. Kernels work on a range of tasks [begin, end); the caller spreads the tasks over threads.
#pragma once

#include <cstdint>
#include <cstring>

namespace rwkv {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline void store(float *to, float x) { *to = x; }
inline void store(bf16 *to, float x) {  // round to nearest, ties to even; a NaN stays one
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// e^x for x <= 0, within 1 ulp; 0 where it would be subnormal; NaN stays NaN. Written without branches or library
// calls, so that the compiler turns a loop over it into vector code for whatever width the machine has.
inline float exp_negative(float x) {
  const float lowest = -87.33654f, clamped = x < lowest ? lowest : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer, kept in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln 2 / 2
  float p = 1.3813144e-3f;  // minimax for (e^r - 1 - r) / r^2, relative error of e^r 3e-9
  p = p * r + 8.369419e-3f;
  p = p * r + 4.1668456e-2f;
  p = p * r + 1.6666515e-1f;
  p = p * r + 4.9999994e-1f;
  p = r * r * p + r + 1.0f;  // the small terms first: their roundings count little
  const float scale = float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^n
  return x < lowest ? 0.0f : p * scale;
}

// wkv4: B sequences of T steps and C channels. A task is one sequence × one range of `width` channels; it goes over time
// in chunks, and through a chunk in blocks of at most WKV4_LANES channels, whose states fit into the first-level cache.
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
  const bool *starts = nullptr; // (B, T) where a document begins, and the state before is the empty one
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

// shift_mix: out_i = x_t μ_i + x_(t-1) (1 - μ_i) for `count` mixes. A task is one sequence × a block of MIX_ROWS steps.
constexpr int64_t MIX_ROWS = 64, MOST_MIXES = 8;

template <class S> struct ShiftMix {
  int64_t B, T, C, count;
  const S *x, *previous;          // (B, T, C); (B, C) or null for zeros
  const float *mix[MOST_MIXES];   // (C) each
  S *out[MOST_MIXES];             // forward: the outputs; backward: unused
  const S *grad[MOST_MIXES];      // backward: gradients of the outputs
  S *dx, *dprevious;              // dprevious may be null
  float *dmix;                    // (tasks, count, C), to be summed over the tasks
  const bool *starts = nullptr;   // (B, T) where a document begins, and zeros are before
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

// out[c] = sum of n columns over rows that are `stride` apart, in their order whatever the number of threads.
void sum_rows(const float *in, float *out, int64_t rows, int64_t n, int64_t stride);

}  // namespace rwkv
