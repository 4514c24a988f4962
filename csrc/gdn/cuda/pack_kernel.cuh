// Contiguous copies of inputs.
//
// grid: kPackThreads threads, four channels each, over [batch, num_tokens, heads, channels].
#pragma once

#include "core/cuda/rows.cuh"

namespace kvcore::gdn {

constexpr int kPackThreads = 256;

struct PackArgs {
  DeviceRows from;
  const float* factor;  // of each row, [batch, num_tokens, heads]; may be null: ones
  int64_t num_tokens, heads;
  int num_channels;
  int64_t num_fours;  // of all channels
};

template <class From, class To>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ PackArgs args, To* to) {
  const int64_t at = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (at >= args.num_fours) return;
  const int64_t row = at / (args.num_channels / 4);
  const int channel = static_cast<int>(at % (args.num_channels / 4)) * 4;
  const int64_t head = row % args.heads, token = row / args.heads % args.num_tokens;
  const int64_t batch_idx = row / args.heads / args.num_tokens;
  float x[4];
  load_channels<From>(args.from, args.from.head(batch_idx, head) + token * args.from.token_stride,
                      channel, x);
  if (args.factor != nullptr) {
    const float factor = args.factor[row];
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] *= factor;
  }
  store_channels(to + row * args.num_channels, channel, x);
}

}  // namespace kvcore::gdn
