// Causal depthwise convolution of a range of channels, per ISA level.
#pragma once

#include "core/cpu/isa.h"
#include "gdn/params.h"

namespace kvcore::gdn {

// Channels and tokens of a tile: its fp32 rows stay in the second-level cache, and a row of bf16
// is 512 bytes of consecutive memory.
constexpr int kConvChannels = 256;
constexpr int kConvTokens = 32;

/// Working memory; rows begin with the width - 1 tokens before the tile.
struct alignas(64) ConvWorkspace {
  float x[(kConvTokens + kMaxConvWidth - 1) * kConvChannels];
  float dz[(kConvTokens + kMaxConvWidth - 1) * kConvChannels];
  float y[kConvTokens * kConvChannels];
  float weight[kMaxConvWidth * kConvChannels], bias[kConvChannels];
  float dweight[kMaxConvWidth * kConvChannels], dbias[kConvChannels];
};

// clang-format off
KVCORE_ISA_DECLARE(
/// Channels [begin, end) of sequence seq_idx, at most kConvChannels.
void conv1d_kernel(const Conv1DParams& p, int64_t seq_idx, int64_t begin, int64_t end,
                   ConvWorkspace& w);
/// Channels [begin, end) of every sequence, in turn.
void conv1d_backward_kernel(const Conv1DBackwardParams& p, int64_t begin, int64_t end,
                            ConvWorkspace& w);
void conv1d_update_kernel(const Conv1DUpdateParams& p, int64_t batch, int64_t begin, int64_t end,
                          ConvWorkspace& w);
)
// clang-format on

}  // namespace kvcore::gdn
