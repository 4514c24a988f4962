// Half-precision values one at a time: exact widening, narrowing to nearest even. For code that is
// compiled per ISA level.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace kvcore::KVCORE_ISA {

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Shifting the fields into place scales by 2^-112, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half* out) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 31 << 15;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and beyond round to infinity
    result = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | result);
}

}  // namespace kvcore::KVCORE_ISA
