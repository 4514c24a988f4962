// The launches of the prefill kernels, one instance in each file of instances/.
#pragma once

#include "turbo/cuda/attention_args.cuh"

namespace kvcore::turbo {

/// Element type of K and V.
template <class T>
void launch_attention_quantize(const AttentionArgs& args);
template <int kHeadDim>
void launch_attention(const AttentionArgs& args);

}  // namespace kvcore::turbo
