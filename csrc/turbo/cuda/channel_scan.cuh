// What calibration and head priority need to know of the tokens of a head, in two steps: sums and
// ranges of each block of 64 tokens, here, and what the op makes of those of a head, in its kernel.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/rows.cuh"
#include "turbo/layout.h"

namespace kvcore::turbo {

/// One block's worth of everything is [head_dim].
struct ScanArguments {
  DeviceRows rows;              // [batch, heads, num_tokens, head_dim]
  const int32_t* left_padding;  // [batch] leading tokens to leave out, may be null
  int64_t heads, num_tokens, max_blocks;
  int head_dim;
  double* sums;  // [batch, heads, max_blocks, head_dim] in the order of the tokens, may be null
  float* low;    // [batch, heads, max_blocks, head_dim] least finite value, +inf without one
  float* high;   // [batch, heads, max_blocks, head_dim] largest finite value, -inf without one
  bool poison;   // low is NaN where a value is not finite
};

/// Tokens of a sequence after its padding; negative if it cannot have so much padding.
__device__ inline int64_t tokens_after_padding(const ScanArguments& a, int64_t batch_idx) {
  if (a.left_padding == nullptr) return a.num_tokens;
  const int64_t padding = a.left_padding[batch_idx];
  return padding < 0 ? -1 : a.num_tokens - padding;
}

// A CTA of head_dim threads takes four blocks; a thread four channels of one of them, whose tokens
// it adds in turn.
constexpr int kScanBlocks = 4;
constexpr int kScanChannels = 4;

template <class T>
__global__ void __launch_bounds__(kMaxHeadDim)
    channel_scan_kernel(const __grid_constant__ ScanArguments a) {
  const int64_t ctas = (a.max_blocks + kScanBlocks - 1) / kScanBlocks;
  const int threads = a.head_dim / kScanChannels;
  const int64_t head = blockIdx.x / ctas, batch_idx = head / a.heads;
  const int64_t block = blockIdx.x % ctas * kScanBlocks + threadIdx.x / threads;
  const int channel = static_cast<int>(threadIdx.x) % threads * kScanChannels;
  // Blocks are counted from the first token that is not padding.
  const int64_t left = tokens_after_padding(a, batch_idx) - block * kPageTokens;
  if (left <= 0) return;
  const int count = left < kPageTokens ? static_cast<int>(left) : kPageTokens;
  const int64_t offset =
      a.rows.head(batch_idx, head % a.heads) + (a.num_tokens - left) * a.rows.token_stride;

  double sum[kScanChannels] = {};
  float low[kScanChannels], high[kScanChannels];
  bool finite[kScanChannels];
#pragma unroll
  for (int j = 0; j < kScanChannels; ++j) {
    low[j] = INFINITY;
    high[j] = -INFINITY;
    finite[j] = true;
  }
  // Eight rows are under way while eight are added: one at a time would leave the memory idle.
  constexpr int kRows = 8;
  for (int begin = 0; begin < count; begin += kRows) {
    float x[kRows][kScanChannels];
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (begin + t < count) {
        load_channels<T>(a.rows, offset + (begin + t) * a.rows.token_stride, channel, x[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (begin + t >= count) continue;
#pragma unroll
      for (int j = 0; j < kScanChannels; ++j) {
        const bool is_finite = fabsf(x[t][j]) < INFINITY;
        sum[j] += x[t][j];
        low[j] = is_finite ? fminf(low[j], x[t][j]) : low[j];
        high[j] = is_finite ? fmaxf(high[j], x[t][j]) : high[j];
        finite[j] = finite[j] && is_finite;
      }
    }
  }
  const int64_t at = (head * a.max_blocks + block) * a.head_dim + channel;
#pragma unroll
  for (int j = 0; j < kScanChannels; ++j) {
    if (a.sums != nullptr) a.sums[at + j] = sum[j];
    a.low[at + j] = a.poison && !finite[j] ? NAN : low[j];
    a.high[at + j] = high[j];
  }
}

}  // namespace kvcore::turbo
