// RMSNorm: x and gate read once from memory, the output written once.
//
// grid: rows, NormGroup::kRows to a CTA.
#pragma once

#include "gdn/cuda/rms_norm_args.cuh"

namespace kvcore::gdn {

struct NormArgs {
  DeviceRows x, weight, gate;  // gate.data may be null
  NormSizes sizes;
  int64_t num_rows;
  float eps, weight_offset;
  void* out;    // [num_rows, channels]
  float* rstd;  // [num_rows]
};

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(const __grid_constant__ NormArgs args) {
  using Group = NormGroup<kRowThreads>;
  const int channels = static_cast<int>(args.sizes.channels);
  const int64_t row = int64_t{blockIdx.x} * Group::kRows + Group::index();
  if (row >= args.num_rows) return;
  const int64_t x_at = row_offset(args.x, args.sizes, row);
  float squares = 0.0f;
#pragma unroll 1
  for (int channel = Group::first_channel(); channel < channels; channel += Group::kStep) {
    ThreadChannels x;
    load_row<T>(args.x, x_at, channel, channels, x);
#pragma unroll
    for (int c = 0; c < kThreadChannels; ++c) squares = __fmaf_rn(x[c], x[c], squares);
  }
  squares = Group::sum(squares, reinterpret_cast<float*>(dynamic_smem()));
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(channels) + args.eps);
  if (Group::first_channel() == 0) args.rstd[row] = rstd;

  const int64_t gate_at = row_offset(args.gate, args.sizes, row);
#pragma unroll 1
  for (int channel = Group::first_channel(); channel < channels; channel += Group::kStep) {
    ThreadChannels x, w, g;
    load_row<T>(args.x, x_at, channel, channels, x);
    load_weights(args.weight, args.weight_offset, channel, channels, w);
    if (args.gate.data != nullptr) load_row<T>(args.gate, gate_at, channel, channels, g);
#pragma unroll
    for (int c = 0; c < kThreadChannels; ++c) {
      x[c] = x[c] * rstd * w[c];
      if (args.gate.data != nullptr) x[c] *= g[c] * fast_sigmoid(g[c]);
    }
    store_row(static_cast<T*>(args.out) + row * channels, channel, channels, x);
  }
}

}  // namespace kvcore::gdn
