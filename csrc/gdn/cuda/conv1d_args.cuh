// What the kernels of the convolution share: rows of four channels, taps, and which sequence a
// token belongs to.
#pragma once

#include "gdn/cuda/channels.cuh"
#include "gdn/cuda/heuristics.h"
#include "gdn/cuda/sequences.cuh"

namespace kvcore::gdn {

constexpr int kConvChannels = kThreadChannels;
constexpr int kConvPast = kMaxConvWidth - 1;

using ConvRow = ThreadChannels;

/// The last tap meets the token itself; of kMaxConvWidth taps the first are absent if the
/// convolution is narrower, and what they would meet is not looked at: it may be NaN.
struct ConvTaps {
  DeviceRows weight, bias;  // bias.data may be null
  int channels, width;

  __device__ bool has(int tap) const { return tap >= kMaxConvWidth - width; }
  __device__ void load(int channel, ConvRow (&weights)[kMaxConvWidth], ConvRow& biases) const {
#pragma unroll
    for (int c = 0; c < kConvChannels; ++c) {
      const bool inside = channel + c < channels;
      biases[c] = inside && bias.data != nullptr ? load_channel(bias, 0, channel + c) : 0.0f;
#pragma unroll
      for (int tap = 0; tap < kMaxConvWidth; ++tap) {
        const int64_t at = (tap - (kMaxConvWidth - width)) * weight.token_stride;
        weights[tap][c] = inside && has(tap) ? load_channel(weight, at, channel + c) : 0.0f;
      }
    }
  }
};

inline ConvTaps conv_taps(const InputView& weight, const InputView& bias, int64_t channels,
                          int64_t width) {
  return {.weight = device_rows(weight),
          .bias = device_rows(bias),
          .channels = static_cast<int>(channels),
          .width = static_cast<int>(width)};
}

/// bias + sum of taps, the oldest token first; one channel.
__device__ inline float tap_sum(const ConvTaps& taps, const ConvRow (&weights)[kMaxConvWidth],
                                const ConvRow (&past)[kConvPast], const ConvRow& now, float bias,
                                int c) {
  float z = bias;
#pragma unroll
  for (int tap = 0; tap < kMaxConvWidth; ++tap) {
    if (taps.has(tap)) z = __fmaf_rn(weights[tap][c], tap < kConvPast ? past[tap][c] : now[c], z);
  }
  return z;
}

/// Moves on by a token.
__device__ inline void push(ConvRow (&past)[kConvPast], const ConvRow& now) {
#pragma unroll
  for (int c = 0; c < kConvChannels; ++c) {
#pragma unroll
    for (int i = 0; i + 1 < kConvPast; ++i) past[i][c] = past[i + 1][c];
    past[kConvPast - 1][c] = now[c];
  }
}
__device__ inline void clear(ConvRow (&past)[kConvPast]) {
#pragma unroll
  for (int i = 0; i < kConvPast; ++i) {
#pragma unroll
    for (int c = 0; c < kConvChannels; ++c) past[i][c] = 0.0f;
  }
}

/// The sequence of a token, for tokens that rise.
struct SequenceCursor {
  const int32_t* cu_seqlens;  // null: one sequence
  int64_t seq, begin, end;

  __device__ SequenceCursor(const SequenceTable& table, int64_t token)
      : cu_seqlens(table.sequences.cu_seqlens), seq(0), begin(0), end(table.num_tokens) {
    if (cu_seqlens == nullptr) return;
    seq = last_that(table.sequences.num_seqs, [&](int64_t i) { return cu_seqlens[i] <= token; });
    begin = cu_seqlens[seq];
    end = cu_seqlens[seq + 1];
  }

  /// token < table.num_tokens.
  __device__ void advance(int64_t token) {
    while (token >= end) {
      ++seq;
      begin = end;
      end = cu_seqlens[seq + 1];
    }
  }
};

/// Tokens [begin, end) of a batch entry and the first of a thread's channels.
struct ConvTile {
  int64_t batch_idx, begin, end;
  int channel;
};
/// grid: channels fastest, then blocks of tokens, then the batch.
struct ConvGrid {
  unsigned channel_blocks, token_blocks;
  int64_t num_tokens;

  __device__ ConvTile tile() const {
    const unsigned block = blockIdx.x / channel_blocks;
    const int64_t begin = int64_t{block % token_blocks} * kConvTokens;
    return {
        block / token_blocks, begin, min(begin + kConvTokens, num_tokens),
        static_cast<int>(blockIdx.x % channel_blocks * kConvThreads + threadIdx.x) * kConvChannels};
  }
};

}  // namespace kvcore::gdn
