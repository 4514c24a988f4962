// Models of the instructions in core/cuda/packed.cuh.
#pragma once

#include <cstdint>

#include "simt/convert.h"

namespace kvcore {

inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [shift](uint32_t x) {
      return static_cast<double>(to_float(Half{static_cast<uint16_t>(x >> shift)}));
    };
    // Exact in double, product and sum, wherever fp32 holds the sum: the kernels' integers.
    const float sum = static_cast<float>(half(a) * half(b) + half(c));
    result |= static_cast<uint32_t>(from_float<Half>(sum).bits) << shift;
  }
  return result;
}

}  // namespace kvcore
