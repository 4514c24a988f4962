// The convolution of a few new tokens behind a kept past: every state read and written once.
//
// grid: a thread for each channel of each sequence. Types are looked at at run time: a token is a
// few elements.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "gdn/cuda/conv1d_args.cuh"
#include "gdn/cuda/slots.cuh"

namespace kvcore::gdn {

// Of a multiprocessor: with fewer registers than they leave, sm_80 spills one.
constexpr int kUpdateCtas = 8;

struct ConvUpdateArgs {
  DeviceRows x, state;  // of the state, tokens are next to each other
  ConvTaps taps;
  OutputView conv_state;  // [num_slots, channels, state_len]
  int64_t num_tokens, state_len;
  SlotTable slots;
  bool silu;
  OutputView out;  // [batch, num_tokens, channels]
  unsigned channel_blocks;
  uint32_t* error_flags;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kUpdateCtas)
    conv1d_update_kernel(const __grid_constant__ ConvUpdateArgs args) {
  const int64_t batch_idx = blockIdx.x / args.channel_blocks;
  const int channels = args.taps.channels;
  const int channel = static_cast<int>(blockIdx.x % args.channel_blocks * kThreads + threadIdx.x);
  const bool rejected = __syncthreads_or(!check_slots(args.slots, batch_idx, 0, 1)) != 0;
  if (rejected && threadIdx.x == 0) report_error(args.error_flags, kErrorStateIndices);
  if (channel >= channels) return;
  const auto store = [&](int64_t token, float y) {
    store_element(args.out, (batch_idx * args.num_tokens + token) * channels + channel, y);
  };
  const int64_t slot = args.slots.slot(batch_idx, 0);
  if (rejected || slot < 0) {
    const float y = rejected ? __int_as_float(0x7fc00000) : 0.0f;
    for (int64_t token = 0; token < args.num_tokens; ++token) store(token, y);
    return;
  }

  const int64_t state_at = args.state.head(slot, 0), x_at = args.x.head(batch_idx, 0);
  const auto load = [&](int64_t token) {
    return load_channel(args.x, x_at + token * args.x.token_stride, channel);
  };
  float weights[kMaxConvWidth] = {}, past[kConvPast] = {};
  const int absent = kMaxConvWidth - args.taps.width;
#pragma unroll
  for (int tap = 0; tap < kMaxConvWidth; ++tap) {
    if (tap < absent) continue;
    weights[tap] =
        load_channel(args.taps.weight, (tap - absent) * args.taps.weight.token_stride, channel);
    if (tap < kConvPast) {
      past[tap] = load_channel(args.state, state_at + args.state_len - kConvPast + tap, channel);
    }
  }
  const float bias =
      args.taps.bias.data != nullptr ? load_channel(args.taps.bias, 0, channel) : 0.0f;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const float now = load(token);
    float z = bias;
#pragma unroll
    for (int tap = 0; tap < kMaxConvWidth; ++tap) {
      if (args.taps.has(tap)) z = __fmaf_rn(weights[tap], tap < kConvPast ? past[tap] : now, z);
    }
#pragma unroll
    for (int i = 0; i + 1 < kConvPast; ++i) past[i] = past[i + 1];
    past[kConvPast - 1] = now;
    store(token, args.silu ? z * fast_sigmoid(z) : z);
  }
  // What moves to the front is read before it is overwritten.
  const int64_t row = (slot * channels + channel) * args.state_len;
  for (int64_t i = 0; i < args.state_len; ++i) {
    const int64_t from = i + args.num_tokens;  // of state and tokens together
    store_element(args.conv_state, row + i,
                  from < args.state_len ? load_channel(args.state, state_at + from, channel)
                                        : load(from - args.state_len));
  }
}

}  // namespace kvcore::gdn
