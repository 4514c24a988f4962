// Coefficients as they are stored, and back. For code that is compiled per ISA level.
#pragma once

#include "core/cpu/vec.h"
#include "lexico/params.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

constexpr uint32_t kNaN32 = 0x7fc00000;
constexpr uint16_t kNaN16 = 0x7e00;
constexpr uint16_t kOne16 = 0x3c00;
constexpr uint16_t kInf16 = 0x7c00;

/// The least fp16 that is not below x >= 0; infinity past the largest.
inline uint16_t half_at_least(float x) {
  Half half;
  narrow(x, &half);
  // Positive halves are in the order of their bits.
  if (widen(half) < x) ++half.bits;
  return half.bits;
}

/// Nearest E4M3 value (sign, 4 exponent bits of bias 7, 3 mantissa bits), to even; |x| <= 448.
inline uint8_t narrow_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 31 << 7, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x3c800000u) {  // below 2^-6: multiples of 2^-9; adding 2^14 rounds to those
    return static_cast<uint8_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0x1p14f) & 0xfu));
  }
  const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
  const uint32_t code = rounded - ((127 - 7) << 3);
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e));
}
inline float widen_e4m3(uint8_t code) {
  // Shifting the fields into place scales by 2^-120, subnormals included.
  const float magnitude = bits_to_float(uint32_t{code & 0x7fu} << 20) * 0x1p120f;
  return code & 0x80 ? -magnitude : magnitude;
}

/// What pursuit found for one vector.
struct Coefficients {
  const double* values;  // [count], to be multiplied by 2^exponent
  int count, exponent, sparsity;
  bool finite;  // the vector is finite
};

/// Writes the coefficients at element `offset`; returns the bits of the scale. A vector that is not
/// finite, or whose scale is not, has the scale NaN and no coefficients.
inline uint16_t store_coefficients(const EncodeParams& p, const Coefficients& c, int64_t offset) {
  double amax = 0;
  for (int j = 0; j < c.count; ++j) {
    const double magnitude = __builtin_fabs(c.values[j]);
    amax = magnitude > amax ? magnitude : amax;
  }
  const double unit = __builtin_ldexp(1.0, c.exponent);
  uint16_t scale = kOne16;
  if (p.dtype != CoefficientType::kFloat32) {
    const double largest = p.dtype == CoefficientType::kInt8 ? kCoefficientMax : kE4M3Max;
    scale = half_at_least(static_cast<float>(amax * unit / largest));
  }
  const bool stored = c.finite && scale < kInf16;
  const double inverse = scale == 0 ? 0 : unit / double{widen(Half{scale})};
  for (int j = 0; j < c.sparsity; ++j) {
    const double value = stored && j < c.count ? c.values[j] * inverse : 0;
    if (p.dtype == CoefficientType::kInt8) {
      static_cast<int8_t*>(p.coefficients)[offset + j] =
          static_cast<int8_t>(__builtin_lrint(value));
    } else if (p.dtype == CoefficientType::kE4M3) {
      static_cast<uint8_t*>(p.coefficients)[offset + j] = narrow_e4m3(static_cast<float>(value));
    } else {
      static_cast<float*>(p.coefficients)[offset + j] = static_cast<float>(value);
    }
  }
  return stored ? scale : kNaN16;
}

/// One coefficient as it was stored, without the scale.
inline float load_coefficient(const void* coefficients, CoefficientType type, int64_t i) {
  switch (type) {
    case CoefficientType::kInt8:
      return static_cast<const int8_t*>(coefficients)[i];
    case CoefficientType::kE4M3:
      return widen_e4m3(static_cast<const uint8_t*>(coefficients)[i]);
    default:
      return static_cast<const float*>(coefficients)[i];
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
