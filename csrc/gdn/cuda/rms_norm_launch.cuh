// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/rms_norm_launch.h"

namespace kvcore::gdn {

template <class T, int kRowThreads>
void launch_norm_rows(const NormArgs& args) {
  launch(rms_norm_kernel<T, kRowThreads>,
         grid_of(ceil_div(args.num_rows, NormGroup<kRowThreads>::kRows)), kNormThreads,
         kNormWarps * sizeof(float), current_stream(), args);
}

template <class T>
void launch_rms_norm(const NormArgs& args) {
  if (args.sizes.channels <= kNormWarpChannels) {
    launch_norm_rows<T, kWarpSize>(args);
  } else {
    launch_norm_rows<T, kNormThreads>(args);
  }
}

template <class T, int kRowThreads>
void launch_norm_rows_backward(const NormBackwardArgs& args) {
  const int floats =
      NormGroup<kRowThreads>::kRows * norm_sum_floats(static_cast<int>(args.sizes.channels));
  launch(rms_norm_backward_kernel<T, kRowThreads>, grid_of(args.num_ctas), kNormThreads,
         (floats + kNormWarps) * sizeof(float), current_stream(), args);
}

template <class T>
void launch_rms_norm_backward(const NormBackwardArgs& args) {
  if (args.sizes.channels <= kNormWarpChannels) {
    launch_norm_rows_backward<T, kWarpSize>(args);
  } else {
    launch_norm_rows_backward<T, kNormThreads>(args);
  }
}

}  // namespace kvcore::gdn
