// The causal depthwise convolution: every element of x read once (but the width - 1 tokens before a
// tile), every element of the output written once.
//
// grid: ConvGrid. A thread takes kConvChannels channels through kConvTokens tokens, with the past
// tokens in registers.
#pragma once

#include "gdn/cuda/conv1d_args.cuh"

namespace kvcore::gdn {

struct ConvArgs {
  DeviceRows x;
  ConvTaps taps;
  SequenceTable table;
  ConvGrid grid;
  bool silu;
  void* out;  // [batch, num_tokens, channels]
};

template <class T>
__global__ void __launch_bounds__(kConvThreads)
    conv1d_kernel(const __grid_constant__ ConvArgs args) {
  const ConvTile tile = args.grid.tile();
  const int channels = args.taps.channels;
  if (!args.table.valid() || tile.channel >= channels) return;
  ConvRow weights[kMaxConvWidth], biases, past[kConvPast];
  args.taps.load(tile.channel, weights, biases);
  const int64_t batch_at = args.x.head(tile.batch_idx, 0);
  const auto load = [&](int64_t token, ConvRow& row) {
    load_row<T>(args.x, batch_at + token * args.x.token_stride, tile.channel, channels, row);
  };
  SequenceCursor cursor(args.table, tile.begin);
  clear(past);
#pragma unroll
  for (int i = 0; i < kConvPast; ++i) {
    const int64_t token = tile.begin - kConvPast + i;
    if (token >= cursor.begin) load(token, past[i]);
  }
  for (int64_t first = tile.begin; first < tile.end; first += kConvAhead) {
    ConvRow now[kConvAhead] = {};
#pragma unroll
    for (int i = 0; i < kConvAhead; ++i) {
      if (first + i < tile.end) load(first + i, now[i]);
    }
#pragma unroll
    for (int i = 0; i < kConvAhead; ++i) {
      const int64_t token = first + i;
      if (token >= tile.end) break;
      if (token >= cursor.end) {
        cursor.advance(token);
        clear(past);
      }
      ConvRow y;
#pragma unroll
      for (int c = 0; c < kConvChannels; ++c) {
        const float z = tap_sum(args.taps, weights, past, now[i], biases[c], c);
        y[c] = args.silu ? z * fast_sigmoid(z) : z;
      }
      push(past, now[i]);
      const int64_t row = (tile.batch_idx * args.grid.num_tokens + token) * channels;
      store_row(static_cast<T*>(args.out) + row, tile.channel, channels, y);
    }
  }
}

}  // namespace kvcore::gdn
