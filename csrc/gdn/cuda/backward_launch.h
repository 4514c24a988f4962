// Launches of the backward's kernels, defined in instances/. kParts is 1 for bf16 inputs, else 2.
#pragma once

#include "gdn/cuda/backward_args.cuh"

namespace kvcore::gdn::backward {

template <int kParts>
void launch_prepare(const BackwardArgs& args);
/// kMaxDim: 128 or 256, at least k_dim; 256 with two parts only.
template <int kParts, int kMaxDim>
void launch_states(const BackwardArgs& args, bool keep);
template <int kParts, int kMaxDim>
void launch_d_states(const BackwardArgs& args);
template <int kParts>
void launch_gradients(const BackwardArgs& args);

}  // namespace kvcore::gdn::backward
