// Rows of channels, four to a thread, of any number and any alignment; and the gate of a channel.
#pragma once

#include "core/cuda/rows.cuh"

namespace kvcore::gdn {

constexpr int kThreadChannels = 4;
using ThreadChannels = float[kThreadChannels];

/// Four channels of the row at an element offset, zeros past the last channel.
template <class T>
__device__ inline void load_row(const DeviceRows& rows, int64_t offset, int channel, int channels,
                                ThreadChannels& x) {
  if (channel + kThreadChannels <= channels) return load_channels<T>(rows, offset, channel, x);
#pragma unroll
  for (int c = 0; c < kThreadChannels; ++c) {
    x[c] = channel + c < channels ? load_channel(rows, offset, channel + c) : 0.0f;
  }
}

/// Four channels of a row of a contiguous output.
template <class T>
__device__ inline void store_row(T* row, int channel, int channels, const ThreadChannels& x) {
  if (channels % kThreadChannels == 0) return store_channels(row, channel, x);
#pragma unroll
  for (int c = 0; c < kThreadChannels; ++c) {
    if (channel + c < channels) row[channel + c] = from_float<T>(x[c]);
  }
}

/// 1 / (1 + e^-x), relative error below 2^-20 where the result is not tiny.
__device__ inline float fast_sigmoid(float x) {
  return rcp_approx(1.0f + exp2_approx(-1.44269504f * x));
}

}  // namespace kvcore::gdn
