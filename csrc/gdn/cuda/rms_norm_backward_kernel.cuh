// Gradients of RMSNorm: x, gate and d_out read once from memory, dx and dgate written once; the sum
// of the weight's gradient over the rows of each CTA, which a second kernel adds up in their order.
//
// grid: ranges of rows. Each group of threads keeps its rows' sum in shared memory.
#pragma once

#include "gdn/cuda/rms_norm_args.cuh"

namespace kvcore::gdn {

struct NormBackwardArgs {
  DeviceRows d_out, x, weight, gate;  // gate.data may be null
  const float* rstd;                  // [num_rows]
  NormSizes sizes;
  int64_t num_rows, cta_rows, num_ctas;
  float weight_offset;
  void* dx;        // [num_rows, channels]
  void* dgate;     // the same; may be null
  float* partial;  // [num_ctas, channels]
  float* dweight;  // [channels]
};

/// Floats of a group's sums.
__host__ __device__ constexpr int norm_sum_floats(int channels) {
  return (channels + kThreadChannels - 1) / kThreadChannels * kThreadChannels;
}

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kNormThreads, kNormBackwardCtas)
    rms_norm_backward_kernel(const __grid_constant__ NormBackwardArgs args) {
  using Group = NormGroup<kRowThreads>;
  const int channels = static_cast<int>(args.sizes.channels);
  const int sum_floats = norm_sum_floats(channels);
  float* const sums = reinterpret_cast<float*>(dynamic_smem());
  float* const own = sums + Group::index() * sum_floats;
  float* const scratch = sums + Group::kRows * sum_floats;
  const bool gated = args.gate.data != nullptr;
#pragma unroll 1
  for (int channel = Group::first_channel(); channel < channels; channel += Group::kStep) {
#pragma unroll
    for (int c = 0; c < kThreadChannels; ++c) own[channel + c] = 0.0f;
  }
  const int64_t begin = blockIdx.x * args.cta_rows;
  const int64_t end = min(begin + args.cta_rows, args.num_rows);
  for (int64_t row = begin + Group::index(); row < end; row += Group::kRows) {
    const int64_t x_at = row_offset(args.x, args.sizes, row);
    const int64_t d_at = row_offset(args.d_out, args.sizes, row);
    const int64_t gate_at = row_offset(args.gate, args.sizes, row);
    const float rstd = args.rstd[row];
    // x becomes n = rstd x; d becomes the gradient of n w; w and g are loaded.
    const auto load = [&](int channel, ThreadChannels& normed, ThreadChannels& d, ThreadChannels& w,
                          ThreadChannels& dgate) {
      ThreadChannels g;
      load_row<T>(args.x, x_at, channel, channels, normed);
      load_row<T>(args.d_out, d_at, channel, channels, d);
      load_weights(args.weight, args.weight_offset, channel, channels, w);
      if (gated) load_row<T>(args.gate, gate_at, channel, channels, g);
#pragma unroll
      for (int c = 0; c < kThreadChannels; ++c) {
        normed[c] *= rstd;
        if (!gated) continue;
        const float s = fast_sigmoid(g[c]), silu = g[c] * s;
        // The derivative of silu: s + g s (1 - s).
        dgate[c] = d[c] * (normed[c] * w[c]) * __fmaf_rn(silu, 1.0f - s, s);
        d[c] *= silu;
      }
    };
    float sum = 0.0f;
#pragma unroll 1
    for (int channel = Group::first_channel(); channel < channels; channel += Group::kStep) {
      ThreadChannels normed, d, w, dgate{};
      load(channel, normed, d, w, dgate);
#pragma unroll
      for (int c = 0; c < kThreadChannels; ++c) {
        own[channel + c] = __fmaf_rn(d[c], normed[c], own[channel + c]);
        sum = __fmaf_rn(d[c] * w[c], normed[c], sum);
      }
      if (gated) {
        store_row(static_cast<T*>(args.dgate) + row * channels, channel, channels, dgate);
      }
    }
    const float mean = Group::sum(sum, scratch) / static_cast<float>(channels);
#pragma unroll 1
    for (int channel = Group::first_channel(); channel < channels; channel += Group::kStep) {
      ThreadChannels normed, d, w, dgate;
      load(channel, normed, d, w, dgate);
#pragma unroll
      for (int c = 0; c < kThreadChannels; ++c) d[c] = rstd * (d[c] * w[c] - normed[c] * mean);
      store_row(static_cast<T*>(args.dx) + row * channels, channel, channels, d);
    }
  }
  __syncthreads();
  for (int channel = static_cast<int>(threadIdx.x); channel < channels; channel += kNormThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int group = 0; group < Group::kRows; ++group) sum += sums[group * sum_floats + channel];
    args.partial[blockIdx.x * args.sizes.channels + channel] = sum;
  }
}

/// grid: channels, a lane for each. A warp adds up every kNormSumWarps-th CTA's sums.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    rms_norm_sums_kernel(const __grid_constant__ NormBackwardArgs args) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t channels = args.sizes.channels;
  const int64_t channel = int64_t{blockIdx.x} * kWarpSize + lane;
  float* const sums = reinterpret_cast<float*>(dynamic_smem());
  float sum = 0.0f;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t cta = warp; cta < args.num_ctas; cta += kWarps) {
      sum += args.partial[cta * channels + channel];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i * kWarpSize + lane];
  args.dweight[channel] = sum;
}

}  // namespace kvcore::gdn
