// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/conv1d_launch.h"

namespace kvcore::gdn {

inline unsigned conv_grid(const ConvGrid& grid, int64_t batch) {
  return grid_of(byte_count({batch, int64_t{grid.channel_blocks}, int64_t{grid.token_blocks}}));
}

template <class T>
void launch_conv1d(const ConvArgs& args, int64_t batch) {
  launch(conv1d_kernel<T>, conv_grid(args.grid, batch), kConvThreads, 0, current_stream(), args);
}

template <class T>
void launch_conv1d_backward(const ConvBackwardArgs& args, int64_t batch) {
  launch(conv1d_backward_kernel<T>, conv_grid(args.grid, batch), kConvThreads, 0, current_stream(),
         args);
}

}  // namespace kvcore::gdn
