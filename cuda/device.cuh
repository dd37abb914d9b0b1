// What the CUDA kernels of every operator family share: storage types, vector loads, launches.
// Free of torch headers. Without nvcc the same sources compile on a CPU: tests/ops/emulator has the `emulator.h`.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CUDA_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#else
#include "emulator.h"
#endif

namespace rwkv {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Two neighbouring elements; V neighbours that are loaded and stored at once.
template <class S> struct Twin;
template <> struct Twin<float> { using type = float2; };
template <> struct Twin<bf16> { using type = __nv_bfloat162; };
template <> struct Twin<fp16> { using type = __half2; };

template <class S, int V> struct __align__(V * sizeof(S)) Pack {
  static_assert(V % 2 == 0, "an odd number of elements is no vector");
  typename Twin<S>::type twins[V / 2];
};
template <class S> struct Pack<S, 1> {
  S one;
};

__device__ __forceinline__ float2 widen(float2 x) { return x; }
__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float2 x, float2 *to) { *to = x; }
__device__ __forceinline__ void narrow(float2 x, __nv_bfloat162 *to) { *to = __float22bfloat162_rn(x); }
__device__ __forceinline__ void narrow(float2 x, __half2 *to) { *to = __float22half2_rn(x); }
__device__ __forceinline__ void narrow(float x, float *to) { *to = x; }
__device__ __forceinline__ void narrow(float x, bf16 *to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, fp16 *to) { *to = __float2half_rn(x); }

template <class S, int V> __device__ __forceinline__ void unpack(const Pack<S, V> &from, float *to) {
  if constexpr (V == 1) {
    to[0] = widen(from.one);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const float2 x = widen(from.twins[i]);
      to[2 * i] = x.x, to[2 * i + 1] = x.y;
    }
  }
}

template <class S, int V> __device__ __forceinline__ Pack<S, V> pack(const float *from) {
  Pack<S, V> to;
  if constexpr (V == 1) {
    narrow(from[0], &to.one);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) narrow(make_float2(from[2 * i], from[2 * i + 1]), &to.twins[i]);
  }
  return to;
}

// A type of BYTES bytes that one access moves; for a struct of pairs nvcc makes an access for each pair.
template <int BYTES> struct WordOf;
template <> struct WordOf<2> { using type = uint16_t; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<16> { using type = uint4; };
template <int BYTES> using Word = typename WordOf<BYTES>::type;

template <class S, int V> __device__ __forceinline__ Pack<S, V> load(const S *from) {
  Pack<S, V> to;
  const auto word = *reinterpret_cast<const Word<sizeof(to)> *>(from);
  memcpy(&to, &word, sizeof to);
  return to;
}

template <class S, int V> __device__ __forceinline__ void store(S *to, const float *from) {
  const Pack<S, V> packed = pack<S, V>(from);
  Word<sizeof(packed)> word;
  memcpy(&word, &packed, sizeof word);
  *reinterpret_cast<Word<sizeof(packed)> *>(to) = word;
}

// Prefetches a cache line that will be read soon. Unlike an early load it costs no register.
__device__ __forceinline__ void prefetch(const void *address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// Whether every pointer may be read V elements at a time, given rows of C elements.
template <class S, int V, class... P> bool aligned(int64_t C, const P *...pointers) {
  return C % V == 0 && ((reinterpret_cast<uintptr_t>(pointers) % (V * sizeof(S)) == 0) && ...);
}

// The result of a launch: null, or the error message.
inline const char *launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls body with a value of the storage type: 0 float, 1 bfloat16, 2 half.
template <class Body> const char *with_storage(int storage, const Body &body) {
  if (storage == 0) return body(float());
  if (storage == 1) return body(bf16());
  return body(fp16());
}

}  // namespace rwkv
