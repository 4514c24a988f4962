// The launches of the two large kernels, which are compiled in files of their own.
#pragma once

#include "lexico/cuda/attention_args.cuh"

namespace kvcore::lexico {

/// tail_too: with the tail and the buffer, beside the blocks.
void launch_scores(const AttentionArgs& args, const LaunchBlocks& blocks, bool tail_too);
/// E: type of the weights of V's tokens; float or Half.
template <class E>
void launch_values(const AttentionArgs& args, const LaunchBlocks& blocks, bool tail_too);

}  // namespace kvcore::lexico
