// Where registers are dearer than arithmetic.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore {

/// x, as something of which the compiler knows nothing: what follows from it is computed again each
/// time, where otherwise dozens of addresses would be kept in registers throughout a loop.
__device__ __forceinline__ int recompute(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ unsigned recompute(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace kvcore
