// Models of the conversions in core/cuda/convert.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

#define KVCORE_ISA simt
#include "core/cpu/half.h"
#undef KVCORE_ISA

namespace kvcore {

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return simt::widen(x); }
inline float to_float(BFloat16 x) { return simt::widen(x); }

template <class T>
inline T from_float(float x) {
  T result;
  simt::narrow(x, &result);
  return result;
}

/// To nearest, ties away from zero, as the instruction does; the low 13 bits are zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Infinity and NaN keep their exponent; a NaN may not lose its last mantissa bit.
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float exp2_approx(float x) {
  // The instruction flushes subnormals, of its input and of its result.
  const float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_approx(float x) {
  return std::log2(std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x);
}
inline float rcp_approx(float x) {
  const float y = 1.0f / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}

}  // namespace kvcore
