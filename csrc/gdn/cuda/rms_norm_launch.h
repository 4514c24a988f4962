// Launches of the norm's kernels, instantiated for each type in instances/.
#pragma once

#include "gdn/cuda/rms_norm_backward_kernel.cuh"
#include "gdn/cuda/rms_norm_kernel.cuh"

namespace kvcore::gdn {

template <class T>
void launch_rms_norm(const NormArgs& args);
template <class T>
void launch_rms_norm_backward(const NormBackwardArgs& args);

}  // namespace kvcore::gdn
