// Models of the instructions in core/cuda/packed.cuh.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt/convert.h"

namespace kvcore {

namespace simt {

/// To nearest even. Rounding to float first would round twice: a float whose last bit is set when
/// it is inexact lies strictly between its neighbours, and rounds as the number itself does.
inline Half round_to_half(long double x) {
  float y = static_cast<float>(x);
  if (static_cast<long double>(y) != x && std::isfinite(y)) {
    if (std::fabs(static_cast<long double>(y)) > std::fabs(x)) y = std::nextafter(y, 0.0f);
    y = bits_to_float(float_to_bits(y) | 1);
  }
  Half result;
  narrow(y, &result);
  return result;
}

}  // namespace simt

inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [shift](uint32_t x) {
      return static_cast<long double>(to_float(Half{static_cast<uint16_t>(x >> shift)}));
    };
    // Exact: its bits lie between 2^-48 and 2^16, or a larger product leaves 22 of them.
    const long double sum = half(a) * half(b) + half(c);
    result |= static_cast<uint32_t>(simt::round_to_half(sum).bits) << shift;
  }
  return result;
}

}  // namespace kvcore
