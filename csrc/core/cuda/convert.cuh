// Element types to and from float, and the fast approximations of the special function unit.
//
//   float to_float(T), T from_float<T>(float)   T: float, Half, BFloat16; nearest even
//   uint32_t to_tf32(float)                     nearest, ties away from zero
//   float exp2_approx(x)    ex2.approx.ftz: relative error below 2^-22, 0 below 2^-126
//   float log2_approx(x)    lg2.approx.ftz: absolute error below 2^-22 for x in [0.5, 2], else
//                           relative error below 2^-22
//   float rcp_approx(x)     rcp.approx.ftz: at most 1 ulp
//
// The host build computes the approximations exactly (correct to a rounding of float), so results
// that use them may differ between the two in their last bits.
#pragma once

#include "core/cuda/device.cuh"
#include "core/types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kvcore {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kvcore
#else
#include "simt/convert.h"
#endif

namespace kvcore {

/// What stands for a result that there is none of.
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fc00000); }

/// Two 16-bit elements in a register, the first in the low half: operands of matrix instructions.
__device__ __forceinline__ uint32_t pack_16(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}
template <class T>
__device__ __forceinline__ uint32_t pack_floats(float low, float high) {
  return pack_16(from_float<T>(low).bits, from_float<T>(high).bits);
}

}  // namespace kvcore
