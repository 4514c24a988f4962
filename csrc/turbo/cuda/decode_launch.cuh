// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/launch.cuh"
#include "turbo/cuda/decode_kernel.cuh"
#include "turbo/cuda/decode_launch.h"

namespace kvcore::turbo {

template <int kHeadDim, int kRows>
void launch_decode(const DecodeArgs& args, unsigned num_blocks) {
  launch(decode_kernel<kHeadDim, kRows>, dim3(num_blocks), dim3(decode_warps(kHeadDim) * kWarpSize),
         sizeof(DecodeSmem<kHeadDim, kRows>), current_stream(), args);
}

}  // namespace kvcore::turbo
