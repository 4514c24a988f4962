// What the kernels of the norm share: which row a group of threads takes, and sums over it.
#pragma once

#include "core/cuda/reduce.cuh"
#include "gdn/cuda/channels.cuh"
#include "gdn/cuda/heuristics.h"
#include "gdn/params.h"

namespace kvcore::gdn {

/// A row is a warp's or a CTA's. What is read a second time comes from the first-level cache. Loops
/// over channels are not unrolled: most rows are one step, and others' registers would spill.
template <int kRowThreads>
struct NormGroup {
  static_assert(kRowThreads == kWarpSize || kRowThreads == kNormThreads);
  static constexpr int kRows = kNormThreads / kRowThreads;  // of a CTA at once
  static constexpr int kStep = kRowThreads * kThreadChannels;

  __device__ static int index() { return static_cast<int>(threadIdx.x) / kRowThreads; }
  __device__ static int first_channel() {
    return static_cast<int>(threadIdx.x) % kRowThreads * kThreadChannels;
  }
  /// `scratch`: kNormWarps floats of shared memory, where a row is a CTA's.
  __device__ static float sum(float x, float* scratch) {
    if constexpr (kRowThreads == kWarpSize) {
      return warp_sum(x);
    } else {
      return block_sum<kNormThreads>(x, scratch);
    }
  }
};

/// The element offset of a row of a view.
__device__ inline int64_t row_offset(const DeviceRows& rows, const NormSizes& sizes, int64_t row) {
  // Divisions of 64 bits are long, and most tensors have one stride.
  if (sizes.batch * sizes.heads == 1) return row * rows.token_stride;
  const int64_t token = row % sizes.num_tokens, outer = row / sizes.num_tokens;
  return rows.head(outer / sizes.heads, outer % sizes.heads) + token * rows.token_stride;
}

/// The factors of four channels.
__device__ inline void load_weights(const DeviceRows& weight, float offset, int channel,
                                    int channels, ThreadChannels& w) {
  switch (weight.dtype) {
    case Dtype::kFloat16:
      load_row<Half>(weight, 0, channel, channels, w);
      break;
    case Dtype::kBFloat16:
      load_row<BFloat16>(weight, 0, channel, channels, w);
      break;
    default:
      load_row<float>(weight, 0, channel, channels, w);
  }
#pragma unroll
  for (int c = 0; c < kThreadChannels; ++c) w[c] += offset;
}

}  // namespace kvcore::gdn
