// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "lexico/cuda/encode_launch.h"
#include "lexico/cuda/encode_select_kernel.cuh"
#include "lexico/cuda/encode_step_kernel.cuh"

namespace kvcore::lexico {

template <int kHeadDim>
void launch_encode_select(const EncodeArgs& args, int step) {
  launch(encode_select_kernel<kHeadDim>, dim3(static_cast<unsigned>(args.select_ctas)),
         dim3(kSelectThreads), select_smem_bytes(kHeadDim), current_stream(), args, step);
}

template <int kQuads>
void launch_encode_step(const EncodeArgs& args, int step) {
  const int64_t blocks = (args.num_vectors + kStepWarps - 1) / kStepWarps;
  launch(encode_step_kernel<kQuads>, dim3(grid_of(blocks)), dim3(kStepWarps * kWarpSize),
         static_cast<size_t>(step_smem_bytes(static_cast<int>(args.p.sparsity))), current_stream(),
         args, step);
}

}  // namespace kvcore::lexico
