// The first kernel of lexico_encode: the dictionary in bf16, in the order in which the search reads
// it, and the lengths of all lists set to 0.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/copy.cuh"
#include "lexico/cuda/encode_args.cuh"

namespace kvcore::lexico {

constexpr int kPackThreads = 256;

/// Four channels of an atom, zeros past the last atom.
__device__ __forceinline__ uint2 load_four(const EncodeParams& p, int64_t atom, int64_t channel) {
  if (atom >= p.atoms) return {0, 0};
  const uint4 bits = load_16(p.dictionary + atom * p.head_dim + channel);
  return {pack_floats<BFloat16>(__uint_as_float(bits.x), __uint_as_float(bits.y)),
          pack_floats<BFloat16>(__uint_as_float(bits.z), __uint_as_float(bits.w))};
}

__global__ void __launch_bounds__(kPackThreads)
    encode_pack_kernel(const __grid_constant__ EncodeArgs args) {
  const int64_t thread = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = thread; i < args.num_counts; i += num_threads) args.counts[i] = 0;

  const int head_dim = static_cast<int>(args.p.head_dim);
  const int64_t units_per_row = head_dim / kUnitChannels;
  const int64_t size =
      int64_t{args.num_stages} * stage_bytes(head_dim) / static_cast<int64_t>(sizeof(uint4));
  for (int64_t i = thread; i < size; i += num_threads) {
    const int lane = static_cast<int>(i % kWarpSize);
    const int64_t unit = i / kWarpSize;
    const int64_t atom = unit / units_per_row * kUnitAtoms + lane / 4;
    const int64_t channel = unit % units_per_row / 2 * 32 + unit % 2 * 4 + lane_channel(lane);
    const uint2 low = load_four(args.p, atom, channel), high = load_four(args.p, atom + 8, channel);
    args.fragments[i] = {low.x, high.x, low.y, high.y};
  }
}

}  // namespace kvcore::lexico
