// What the CPU kernels of every operator family share: storage types, a vectorisable exponential, sums over rows.
// Free of torch headers. Kernels work on a range of tasks [begin, end); the caller spreads the tasks over threads.
#pragma once

#include <algorithm>
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
  p = r * r * p + r + 1.0f;  // the small terms first: their rounding errors hardly matter
  const float scale = float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^n
  return x < lowest ? 0.0f : p * scale;
}

// 1 / (1 + e^-x), without overflow or cancellation.
inline float sigmoid(float x) {
  const float e = exp_negative(x < 0.0f ? x : -x), s = 1.0f / (1.0f + e);
  return x < 0.0f ? e * s : s;
}

// out[c] = sum over rows of in[row * stride + c] for c < n, in the order of the rows whatever the number of threads.
inline void sum_rows(const float *in, float *out, int64_t rows, int64_t n, int64_t stride) {
  std::fill_n(out, n, 0.0f);
  for (int64_t row = 0; row < rows; ++row)
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] += in[row * stride + c];
}

}  // namespace rwkv
