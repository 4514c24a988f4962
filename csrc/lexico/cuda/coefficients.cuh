// Coefficients as they are stored, and back.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/reduce.cuh"
#include "lexico/cuda/arithmetic.cuh"
#include "lexico/params.h"

namespace kvcore::lexico {

constexpr uint16_t kNaN16 = 0x7e00;
constexpr uint16_t kOne16 = 0x3c00;
constexpr uint16_t kInf16 = 0x7c00;

/// The least fp16 that is not below x >= 0; infinity past the largest.
__device__ inline uint16_t half_at_least(float x) {
  Half half = from_float<Half>(x);
  // Positive halves are in the order of their bits.
  if (to_float(half) < x) ++half.bits;
  return half.bits;
}

/// Nearest E4M3 value (sign, 4 exponent bits of bias 7, 3 mantissa bits), to even; |x| <= 448.
__device__ inline uint8_t narrow_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 31 << 7, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x3c800000u) {  // below 2^-6: multiples of 2^-9; adding 2^14 rounds to those
    const float rounded = __fadd_rn(__uint_as_float(magnitude), 0x1p14f);
    return static_cast<uint8_t>(sign | (__float_as_uint(rounded) & 0xfu));
  }
  const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
  const uint32_t code = rounded - ((127 - 7) << 3);
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e));
}
__device__ inline float widen_e4m3(uint8_t code) {
  // Shifting the fields into place scales by 2^-120, subnormals included.
  const float magnitude = __uint_as_float(uint32_t{code & 0x7fu} << 20) * 0x1p120f;
  return code & 0x80 ? -magnitude : magnitude;
}

/// What one lane has of a vector's code: coefficients lane and lane + 32, to be multiplied by
/// 2^exponent, 0 past the last one.
struct LaneCoefficients {
  double values[2];
  int exponent;
  bool finite;  // the vector is finite
};

/// Writes the coefficients at element `offset`, and the scale. A vector that is not finite, or
/// whose scale is not, has the scale NaN and no coefficients. All lanes call it together.
__device__ inline void store_coefficients(const EncodeParams& p, const LaneCoefficients& c,
                                          int64_t vector_idx, int lane) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const double amax = warp_reduce(larger(fabs(c.values[0]), fabs(c.values[1])), larger);
  const double unit = pow2(c.exponent);
  uint16_t scale = kOne16;
  if (p.dtype != CoefficientType::kFloat32) {
    const double share = p.dtype == CoefficientType::kInt8 ? 1.0 / kCoefficientMax : 1.0 / kE4M3Max;
    scale = half_at_least(static_cast<float>(amax * unit * share));
  }
  const bool stored = c.finite && scale < kInf16;
  const double inverse = scale == 0 ? 0 : unit * reciprocal(to_float(Half{scale}));
  for (int i = 0; i < 2; ++i) {
    const int j = lane + kWarpSize * i;
    if (j >= p.sparsity) continue;
    const double value = stored ? c.values[i] * inverse : 0;
    const int64_t at = vector_idx * p.sparsity + j;
    if (p.dtype == CoefficientType::kInt8) {
      static_cast<int8_t*>(p.coefficients)[at] = static_cast<int8_t>(static_cast<int>(rint(value)));
    } else if (p.dtype == CoefficientType::kE4M3) {
      static_cast<uint8_t*>(p.coefficients)[at] = narrow_e4m3(static_cast<float>(value));
    } else {
      static_cast<float*>(p.coefficients)[at] = static_cast<float>(value);
    }
  }
  if (lane == 0) p.scale[vector_idx] = stored ? scale : kNaN16;
}

/// One coefficient as it was stored, without the scale.
__device__ inline float load_coefficient(const void* coefficients, CoefficientType type,
                                         int64_t i) {
  switch (type) {
    case CoefficientType::kInt8:
      return static_cast<const int8_t*>(coefficients)[i];
    case CoefficientType::kE4M3:
      return widen_e4m3(static_cast<const uint8_t*>(coefficients)[i]);
    default:
      return static_cast<const float*>(coefficients)[i];
  }
}

}  // namespace kvcore::lexico
