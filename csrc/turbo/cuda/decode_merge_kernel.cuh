// Merges the splits of a row in their order, with exact exponentials, whatever order they ended in.
//
// grid: one CTA for kMergeRows rows, a warp each, of all rows [batch, kv_heads, num_rows].
#pragma once

#include "turbo/cuda/decode_args.cuh"
#include "turbo/cuda/query_rows.cuh"

namespace kvcore::turbo {

template <int kHeadDim>
__global__ void __launch_bounds__(kMergeRows* kWarpSize)
    decode_merge_kernel(const __grid_constant__ DecodeArgs args) {
  constexpr int kOfLane = kHeadDim / kWarpSize;
  const DecodeParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * kMergeRows + threadIdx.x / kWarpSize;
  const int64_t unit = index / args.plan.num_rows, row = index % args.plan.num_rows;
  const int64_t batch_idx = unit / args.store.kv_heads, kv_head = unit % args.store.kv_heads;
  if (batch_idx >= p.store.batch) return;
  // The tile that the row was computed in: its splits are those that were written.
  const int64_t first_row = row / args.plan.tile_rows * args.plan.tile_rows;
  const DecodeTile tile = decode_tile(
      args, batch_idx, kv_head, first_row,
      static_cast<int>(min(int64_t{args.plan.tile_rows}, args.plan.num_rows - first_row)));
  const int tile_row = static_cast<int>(row - first_row);

  float m = negative_infinity();
  for (int64_t split = tile.splits.begin + lane; split < tile.splits.end; split += kWarpSize) {
    m = fmaxf(m, args.partials[partial_index(args, tile, split, tile_row)].m);
  }
  m = warp_max(m);
  const float base = m == negative_infinity() ? 0.0f : m;
  float l = 0.0f, mean_term = 0.0f, o[kOfLane] = {};
#pragma unroll 4
  for (int64_t split = tile.splits.begin; split < tile.splits.end; ++split) {
    const int64_t at = partial_index(args, tile, split, tile_row);
    const DecodePartial partial = args.partials[at];
    const float weight = exp2_approx(partial.m - base);
    l = __fmaf_rn(weight, partial.l, l);
    mean_term = partial.mean_term;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      o[i] = __fmaf_rn(weight, args.partial_o[at * kHeadDim + lane + kWarpSize * i], o[i]);
    }
  }
  if (!tile.is_valid) l = quiet_nan();
  const RowResult result = finish_row(m, l, mean_term);
  const int64_t token = row / args.plan.group,
                head = kv_head * args.plan.group + row % args.plan.group;
  const int64_t at = (batch_idx * p.q_heads + head) * p.q_len + token;
  if (lane == 0) p.lse[at] = result.lse;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    store_element(p.out, at * kHeadDim + lane + kWarpSize * i, o[i] * result.factor);
  }
}

}  // namespace kvcore::turbo
