// turbo_head_priority, after the scan of the blocks: what they tell of a head.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "turbo/cuda/channel_scan.cuh"

namespace kvcore::turbo {

struct HeadPriorityArguments {
  ScanArguments scan;  // poisoned
  float* priority;     // [batch, heads]
  uint32_t* error_flags;
};

/// gap * std of finite ranges; sums over channels in turn, so by one thread.
__device__ inline float priority_of_head(const float* low, const float* high, int head_dim) {
  double lowest = low[0], highest = high[0], sum = 0, squares = 0;
  for (int c = 0; c < head_dim; ++c) {
    lowest = fmin(lowest, static_cast<double>(low[c]));
    highest = fmax(highest, static_cast<double>(high[c]));
    sum += static_cast<double>(high[c]) - low[c];
  }
  const double mean = sum / head_dim;
  for (int c = 0; c < head_dim; ++c) {
    const double deviation = static_cast<double>(high[c]) - low[c] - mean;
    squares += deviation * deviation;
  }
  return static_cast<float>((highest - lowest) * sqrt(squares / head_dim));
}

/// A CTA of head_dim threads per head, a thread a channel; shared memory: 2 * head_dim floats.
__global__ void __launch_bounds__(kMaxHeadDim)
    head_priority_kernel(const __grid_constant__ HeadPriorityArguments a) {
  const ScanArguments& scan = a.scan;
  const int64_t head = blockIdx.x;
  const int channel = static_cast<int>(threadIdx.x);
  const int64_t num_tokens = tokens_after_padding(scan, head / scan.heads);
  if (num_tokens <= 0) {
    if (channel != 0) return;
    a.priority[head] = num_tokens < 0 ? NAN : 0;
    if (num_tokens < 0) report_error(a.error_flags, kErrorLeftPadding);
    return;
  }
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  const int64_t num_blocks = (num_tokens + kPageTokens - 1) / kPageTokens;
#pragma unroll 8
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t at = (head * scan.max_blocks + i) * scan.head_dim + channel;
    finite = finite && scan.low[at] == scan.low[at];
    low = fminf(low, scan.low[at]);
    high = fmaxf(high, scan.high[at]);
  }
  float* low_smem = reinterpret_cast<float*>(dynamic_smem());
  float* high_smem = low_smem + scan.head_dim;
  low_smem[channel] = low;
  high_smem[channel] = high;
  const bool poisoned = __syncthreads_or(!finite) != 0;
  if (channel == 0) {
    a.priority[head] = poisoned ? NAN : priority_of_head(low_smem, high_smem, scan.head_dim);
  }
}

}  // namespace kvcore::turbo
