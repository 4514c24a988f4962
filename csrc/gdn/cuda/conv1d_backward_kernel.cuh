// Gradients of the convolution: x and d_out read once, dx written once; sums of dweight and dbias
// per tile of tokens, which a second kernel adds up in their order.
//
// grid: ConvGrid. A thread goes through its tokens and the kConvPast behind them: dz of a token
// (the gradient before the activation) is needed by the dx of the tokens before it.
#pragma once

#include "gdn/cuda/conv1d_args.cuh"

namespace kvcore::gdn {

constexpr int kConvSums = kMaxConvWidth + 1;  // a sum for each tap, and dbias

struct ConvBackwardArgs {
  DeviceRows d_out, x;
  ConvTaps taps;
  SequenceTable table;
  ConvGrid grid;
  int64_t num_tiles;  // of tokens, in all batch entries
  bool silu;
  void* dx;        // [batch, num_tokens, channels]
  float* partial;  // [num_tiles, kConvSums, channels]
  float* dweight;  // [channels, width]
  float* dbias;    // [channels]
};

template <class T>
__global__ void __launch_bounds__(kConvThreads)
    conv1d_backward_kernel(const __grid_constant__ ConvBackwardArgs args) {
  const ConvTile tile = args.grid.tile();
  const int channels = args.taps.channels;
  const int64_t num_tokens = args.grid.num_tokens;
  if (!args.table.valid() || tile.channel >= channels) return;
  ConvRow weights[kMaxConvWidth], biases, past[kConvPast], dz[kConvPast], sums[kConvSums] = {};
  args.taps.load(tile.channel, weights, biases);
  const auto load = [&](const DeviceRows& rows, int64_t token, ConvRow& row) {
    load_row<T>(rows, rows.head(tile.batch_idx, 0) + token * rows.token_stride, tile.channel,
                channels, row);
  };
  // One sequence is that of the token whose dz is computed, the other that of the token, kConvPast
  // earlier, whose dx is.
  SequenceCursor ahead(args.table, tile.begin), behind(args.table, tile.begin);
  clear(past);
  clear(dz);
#pragma unroll
  for (int i = 0; i < kConvPast; ++i) {
    const int64_t token = tile.begin - kConvPast + i;
    if (token >= ahead.begin) load(args.x, token, past[i]);
  }
  for (int64_t token = tile.begin; token < tile.end + kConvPast; ++token) {
    ConvRow now = {}, d = {};
    if (token < num_tokens) {
      load(args.x, token, now);
      load(args.d_out, token, d);
      if (token >= ahead.end) {
        ahead.advance(token);
        clear(past);
      }
    }
    if (args.silu) {
#pragma unroll
      for (int c = 0; c < kConvChannels; ++c) {
        const float z = tap_sum(args.taps, weights, past, now, biases[c], c), s = fast_sigmoid(z);
        d[c] = d[c] * s * (1.0f + z * (1.0f - s));
      }
    }
    if (token < tile.end) {
#pragma unroll
      for (int c = 0; c < kConvChannels; ++c) {
#pragma unroll
        for (int tap = 0; tap < kMaxConvWidth; ++tap) {
          const float x = tap < kConvPast ? past[tap][c] : now[c];
          if (args.taps.has(tap)) sums[tap][c] = __fmaf_rn(d[c], x, sums[tap][c]);
        }
        sums[kMaxConvWidth][c] += d[c];
      }
    }
    push(past, now);
    const int64_t target = token - kConvPast;
    if (target >= tile.begin) {
      behind.advance(target);
      ConvRow dx = {};
#pragma unroll
      for (int tap = 0; tap < kMaxConvWidth; ++tap) {
        // The token that met x through this tap.
        const bool inside = args.taps.has(tap) && target + kConvPast - tap < behind.end;
#pragma unroll
        for (int c = 0; c < kConvChannels; ++c) {
          const float by = tap == 0 ? d[c] : dz[kConvPast - tap][c];
          if (inside) dx[c] = __fmaf_rn(weights[tap][c], by, dx[c]);
        }
      }
      const int64_t row = (tile.batch_idx * num_tokens + target) * channels;
      store_row(static_cast<T*>(args.dx) + row, tile.channel, channels, dx);
    }
    push(dz, d);
  }
  const int64_t tile_idx = tile.batch_idx * args.grid.token_blocks + tile.begin / kConvTokens;
  float* const partial = args.partial + tile_idx * kConvSums * channels;
#pragma unroll
  for (int i = 0; i < kConvSums; ++i) {
    store_row(partial + int64_t{i} * channels, tile.channel, channels, sums[i]);
  }
}

/// grid: channels over threads, times the sums.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    conv1d_sums_kernel(const __grid_constant__ ConvBackwardArgs args) {
  const int channels = args.taps.channels, width = args.taps.width;
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int which = static_cast<int>(blockIdx.y);
  if (!args.table.valid() || channel >= channels) return;
  if (which < kMaxConvWidth && !args.taps.has(which)) return;
  float sum = 0.0f;
  for (int64_t tile = 0; tile < args.num_tiles; ++tile) {
    sum += args.partial[(tile * kConvSums + which) * channels + channel];
  }
  if (which == kMaxConvWidth) {
    args.dbias[channel] = sum;
  } else {
    args.dweight[int64_t{channel} * width + which - (kMaxConvWidth - width)] = sum;
  }
}

}  // namespace kvcore::gdn
