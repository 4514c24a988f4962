// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "turbo/cuda/attention_launch.h"
#include "turbo/cuda/attention_quantize_kernel.cuh"

namespace kvcore::turbo {

template <class T>
void launch_attention_quantize(const AttentionArgs& args) {
  launch(attention_quantize_kernel<T>, dim3(grid_of(args.num_pages * args.p.kv_heads * 2)),
         dim3(static_cast<unsigned>(args.p.head_dim)), kMagnitudeBytes, current_stream(), args,
         device_rows(args.p.k), device_rows(args.p.v));
}

}  // namespace kvcore::turbo
