// Vectors of the machine's width, by the compiler's own extension: arithmetic on them needs no intrinsics.
#pragma once

#include <cstdint>
#include <utility>

namespace rwkv {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t lane_numbers __attribute__((vector_size(4 * LANES)));

// One lane number for each lane of the result, which are known to the compiler: lane n of (x, y), x's lanes first.
template <class Choice, std::size_t... I> inline vec pick(vec x, vec y, Choice, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, Choice::lane(I)...);
#else
  return __builtin_shuffle(x, y, lane_numbers{Choice::lane(I)...});
#endif
}

// With groups of G lanes in x and in y: the first or second half of every group, x's groups first.
template <int G, bool SECOND> struct HalfGroups {
  static constexpr int lane(std::size_t i) {
    const int half = G / 2;
    return int(i) / half * G + int(i) % half + (SECOND ? half : 0);
  }
};

// Sums groups of G lanes to half as many lanes: x's groups first, then y's.
template <int G> inline vec fold(vec x, vec y) {
  constexpr auto lanes = std::make_index_sequence<std::size_t(LANES)>();
  return pick(x, y, HalfGroups<G, false>(), lanes) + pick(x, y, HalfGroups<G, true>(), lanes);
}

// sums[i] = the sum of the lanes of x[i], for four vectors.
inline void sum_lanes(const vec *x, float *sums) {
  vec z = fold<LANES / 2>(fold<LANES>(x[0], x[1]), fold<LANES>(x[2], x[3]));
  if constexpr (LANES >= 8) z = fold<LANES / 4>(z, z);
  if constexpr (LANES >= 16) z = fold<LANES / 8>(z, z);
  for (int i = 0; i < 4; ++i) sums[i] = z[i];
}

}  // namespace rwkv
