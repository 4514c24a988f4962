// Launches of the convolution's kernels, instantiated for each type in instances/.
#pragma once

#include "gdn/cuda/conv1d_backward_kernel.cuh"
#include "gdn/cuda/conv1d_kernel.cuh"

namespace kvcore::gdn {

template <class T>
void launch_conv1d(const ConvArgs& args, int64_t batch);
template <class T>
void launch_conv1d_backward(const ConvBackwardArgs& args, int64_t batch);

}  // namespace kvcore::gdn
