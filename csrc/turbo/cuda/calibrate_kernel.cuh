// turbo_calibrate, after the scan of the blocks: what they tell of a head.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "turbo/cuda/channel_scan.cuh"

namespace kvcore::turbo {

constexpr float kMinBalance = 0x1p-8f;

struct CalibrateArguments {
  ScanArguments scan;
  int rotary_dim;
  bool balance, subtract_mean;
  float* k_balance;  // [batch, kv_heads, head_dim]
  float* k_mean;     // [batch, kv_heads, head_dim]
  uint32_t* error_flags;
};

/// amax of the finite |k - mean| of a channel, the hard way: for ranges whose ends overflow.
__device__ inline float amax_of_channel(const ScanArguments& scan, int64_t head, int64_t num_tokens,
                                        int channel, float mean) {
  const int64_t offset = scan.rows.head(head / scan.heads, head % scan.heads);
  float amax = 0;
  for (int64_t t = scan.num_tokens - num_tokens; t < scan.num_tokens; ++t) {
    const float x = load_channel(scan.rows, offset + t * scan.rows.token_stride, channel);
    const float difference = fabsf(x - mean);
    if (difference < INFINITY) amax = fmaxf(amax, difference);
  }
  return amax;
}

/// A CTA of head_dim threads per head, a thread a channel; shared memory: head_dim floats.
__global__ void __launch_bounds__(kMaxHeadDim)
    calibrate_kernel(const __grid_constant__ CalibrateArguments a) {
  const ScanArguments& scan = a.scan;
  const int64_t head = blockIdx.x;
  const int channel = static_cast<int>(threadIdx.x);
  const int64_t out = head * scan.head_dim + channel;
  const int64_t num_tokens = tokens_after_padding(scan, head / scan.heads);
  if (num_tokens < 0) {
    a.k_balance[out] = a.k_mean[out] = NAN;
    if (channel == 0) report_error(a.error_flags, kErrorLeftPadding);
    return;
  }
  double total = 0;
  float low = INFINITY, high = -INFINITY;
  const int64_t num_blocks = (num_tokens + kPageTokens - 1) / kPageTokens;
#pragma unroll 8
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t at = (head * scan.max_blocks + i) * scan.head_dim + channel;
    total += scan.sums[at];
    low = fminf(low, scan.low[at]);
    high = fmaxf(high, scan.high[at]);
  }
  const float value = static_cast<float>(total / static_cast<double>(num_tokens));
  const bool subtracted = a.subtract_mean && num_tokens > 0 && fabsf(value) < INFINITY;
  const float mean = subtracted ? value : 0;
  a.k_mean[out] = mean;

  // Rounded subtraction is monotonic: no value between the ends is farther from the mean.
  float amax = low > high ? 0 : fmaxf(fabsf(low - mean), fabsf(high - mean));
  if (!(amax < INFINITY)) amax = amax_of_channel(scan, head, num_tokens, channel, mean);
  float* amax_smem = reinterpret_cast<float*>(dynamic_smem());
  amax_smem[channel] = amax;
  __syncthreads();
  const int half = a.rotary_dim / 2;
  if (channel < a.rotary_dim) {
    amax = fmaxf(amax, amax_smem[channel < half ? channel + half : channel - half]);
  }
  float largest = 0;
  for (int c = channel % kWarpSize; c < scan.head_dim; c += kWarpSize) {
    largest = fmaxf(largest, amax_smem[c]);
  }
  largest = warp_max(largest);
  const float root = sqrtf(amax / largest);
  a.k_balance[out] = a.balance && largest > 0 ? fmaxf(root * sqrtf(root), kMinBalance) : 1;
}

}  // namespace kvcore::turbo
