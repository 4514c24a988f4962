// Reductions whose order is fixed: the same inputs give the same bits on every run.
//
// A warp's go over lane distances kLanes / 2, ..., 1, so that each group of kLanes neighbouring
// lanes (a power of two) ends with the result in all of its lanes; kLanes = 4 are the lanes that
// share the rows of an mma fragment. All 32 lanes call them. max and min leave NaN out, as fmaxf
// does.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
  __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const {
    return a > b ? a : b;
  }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
  __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const {
    return a < b ? a : b;
  }
};

template <int kLanes = kWarpSize, class T, class Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
  static_assert(kLanes >= 1 && kLanes <= kWarpSize && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = op(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}
template <int kLanes = kWarpSize, class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce<kLanes>(x, Sum{});
}
template <int kLanes = kWarpSize, class T>
__device__ __forceinline__ T warp_max(T x) {
  return warp_reduce<kLanes>(x, Max{});
}
template <int kLanes = kWarpSize, class T>
__device__ __forceinline__ T warp_min(T x) {
  return warp_reduce<kLanes>(x, Min{});
}

/// Over a one-dimensional block of kThreads, the result in every thread. `scratch`: shared memory
/// for kThreads / 32 values, free again when it returns. Begins and ends with a barrier.
template <int kThreads, class T, class Op>
__device__ __forceinline__ T block_reduce(T x, T* scratch, Op op) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / kWarpSize;
  x = warp_reduce(x, op);
  if (kWarps == 1) return x;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) x = op(x, scratch[warp]);
  __syncthreads();
  return x;
}
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  return block_reduce<kThreads>(x, scratch, Sum{});
}
template <int kThreads, class T>
__device__ __forceinline__ T block_max(T x, T* scratch) {
  return block_reduce<kThreads>(x, scratch, Max{});
}
template <int kThreads, class T>
__device__ __forceinline__ T block_min(T x, T* scratch) {
  return block_reduce<kThreads>(x, scratch, Min{});
}

}  // namespace kvcore
