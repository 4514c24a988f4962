// The launches of the decode kernel, one instance in each file of instances/.
#pragma once

#include "turbo/cuda/decode_args.cuh"

namespace kvcore::turbo {

/// kRows: plan.tile_rows. num_blocks: tiles * splits * kv_heads * batch.
template <int kHeadDim, int kRows>
void launch_decode(const DecodeArgs& args, unsigned num_blocks);

}  // namespace kvcore::turbo
