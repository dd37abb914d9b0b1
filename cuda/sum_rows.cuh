// Sums over rows in one fixed order: the last step of the gradients of w, u and the mixes. No atomics, so that results
// are bit-equal from run to run.
#pragma once

#include "device.cuh"

namespace rwkv {

constexpr int MAX_SUMS = 8, SUM_LANES = 32, SUM_ROWS = 8;

struct Sums {
  const float *in;
  int64_t rows, n, stride, offset;  // out[i][c] = Σ over row of in[i · offset + row · stride + c] for c < n
  int count;
  float *out[MAX_SUMS];
};

static __global__ __launch_bounds__(SUM_LANES * SUM_ROWS) void sum_rows_kernel(const __grid_constant__ Sums a) {
  __shared__ float part[SUM_ROWS][SUM_LANES];
  const int64_t c = int64_t(blockIdx.x) * SUM_LANES + threadIdx.x;
  float sum = 0.f;
  if (c < a.n) {
    const float *in = a.in + blockIdx.y * a.offset + c;
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < a.rows; row += SUM_ROWS) sum += in[row * a.stride];
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= a.n) return;
  for (int row = 1; row < SUM_ROWS; ++row) sum += part[row][threadIdx.x];
  a.out[blockIdx.y][c] = sum;
}

inline const char *sum_rows(const Sums &a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.n + SUM_LANES - 1) / SUM_LANES), unsigned(a.count));
  CUDA_LAUNCH(sum_rows_kernel, grid, dim3(SUM_LANES, SUM_ROWS), stream, a);
  return launched();
}

}  // namespace rwkv
