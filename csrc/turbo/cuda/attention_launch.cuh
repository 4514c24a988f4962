// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "turbo/cuda/attention_kernel.cuh"
#include "turbo/cuda/attention_launch.h"

namespace kvcore::turbo {

template <int kHeadDim>
void launch_attention(const AttentionArgs& args) {
  launch(attention_kernel<kHeadDim>, dim3(grid_of(args.num_tiles * args.p.kv_heads)),
         dim3(kAttentionWarps * kWarpSize), sizeof(AttentionSmem<kHeadDim>), current_stream(),
         args);
}

}  // namespace kvcore::turbo
