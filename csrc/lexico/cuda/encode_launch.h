// The launches of the kernels that depend on head_dim; each is compiled in instances/.
#pragma once

#include "lexico/cuda/encode_args.cuh"

namespace kvcore::lexico {

template <int kHeadDim>
void launch_encode_select(const EncodeArgs& args, int step);
/// kQuads: head_dim / 128, rounded up.
template <int kQuads>
void launch_encode_step(const EncodeArgs& args, int step);

}  // namespace kvcore::lexico
