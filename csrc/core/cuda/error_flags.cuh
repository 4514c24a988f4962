// The word of each device in which kernels report errors.
#pragma once

#include "core/cuda/device.cuh"
#include "core/error_flags.h"

namespace kvcore {

/// Of the current device, to be passed to kernels. No allocation: it is part of the library.
uint32_t* error_flags();

/// For kernels; any number of threads may report.
__device__ __forceinline__ void report_error(uint32_t* error_flags, ErrorFlag flag) {
  atomicOr(error_flags, static_cast<uint32_t>(flag));
}

}  // namespace kvcore
