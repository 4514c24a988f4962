// fp64 arithmetic without the subroutines of division and square root, which cost registers at
// every call: Newton's iteration from an approximation in fp32, to an ulp or two.
#pragma once

#include "core/cuda/convert.cuh"

namespace kvcore::lexico {

/// 2^n for n in [-252, 254]. In two factors: as a float it may be subnormal, or too large.
__device__ __forceinline__ double pow2(int n) {
  const int half = n / 2;
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(half + 127) << 23)) *
         static_cast<double>(__uint_as_float(static_cast<unsigned>(n - half + 127) << 23));
}

/// 1 / x for x in [2^-126, 2^125].
__device__ __forceinline__ double reciprocal(double x) {
  double y = rcp_approx(static_cast<float>(x));  // relative error below 2^-22
#pragma unroll
  for (int i = 0; i < 2; ++i) y = __fma_rn(y, __fma_rn(-x, y, 1.0), y);
  return y;
}

/// 1 / sqrt(x) for x in [2^-126, 2^126].
__device__ __forceinline__ double inverse_sqrt(double x) {
  double y = exp2_approx(-0.5f * log2_approx(static_cast<float>(x)));  // error below 2^-15
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const double error = __fma_rn(-x * y, y, 1.0);
    y = __fma_rn(0.5 * y, __fma_rn(0.75 * error, error, error), y);
  }
  return y;
}

}  // namespace kvcore::lexico
