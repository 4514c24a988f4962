// Arithmetic on several small numbers in one 32-bit register.
//
//   uint32_t fma_f16x2(a, b, c)   a * b + c on two fp16, rounded once to nearest even; subnormal
//                                 operands and results are kept
#pragma once

#include "core/cuda/device.cuh"

#ifdef __CUDACC__
namespace kvcore {

__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

}  // namespace kvcore
#else
#include "simt/packed.h"
#endif
