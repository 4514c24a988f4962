// Running sums of integers.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore {

/// Over a one-dimensional block of kThreads: the sum of x of the threads before this one, and in
/// `total` that of all. `scratch`: shared memory for kThreads / 32 values, free again when it
/// returns. Begins and ends with a barrier.
template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int x, int* scratch, int& total) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int sum = x;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? scratch[w] : 0;
    total += scratch[w];
  }
  __syncthreads();
  return before + sum - x;
}

}  // namespace kvcore
