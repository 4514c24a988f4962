// The second kernel of lexico_encode: the vectors of a chunk into their slots, those that are zero
// or not finite done at once. A warp takes a vector.
#pragma once

#include "core/cuda/rows.cuh"
#include "lexico/cuda/atom_rows.cuh"
#include "lexico/cuda/encode_finish.cuh"

namespace kvcore::lexico {

/// Shared memory of the block: what keep_slots needs.
constexpr int kLoadBytes = (kStepWarps + 1) * static_cast<int>(sizeof(int));

__global__ void __launch_bounds__(kStepWarps* kWarpSize)
    encode_load_kernel(const __grid_constant__ EncodeArgs args, DeviceRows x) {
  const EncodeParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int slot = static_cast<int>(blockIdx.x) * kStepWarps + warp;
  const int head_dim = static_cast<int>(p.head_dim);
  bool is_kept = false;
  if (slot < args.num_vectors) {
    constexpr int kQuads = kMaxHeadDim / 128;
    const int64_t vector_idx = args.first_vector + slot;
    const int64_t head = vector_idx / p.tokens;
    const int64_t offset =
        x.head(head / p.heads, head % p.heads) + vector_idx % p.tokens * x.token_stride;
    Row<kQuads> row;
    float amax = 0;
    bool is_finite = true;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = quad_channel(lane, q) + i;
        row.x[q][i] = channel < head_dim ? load_channel(x, offset, channel) : 0.0f;
        amax = fmaxf(amax, fabsf(row.x[q][i]));
        is_finite = is_finite && isfinite(row.x[q][i]);
      }
    }
    amax = warp_max(amax);
    is_finite = __all_sync(kAllLanes, is_finite) != 0;
    is_kept = is_finite && amax > 0;
    if (is_kept) {
      // The largest channel comes into [1, 2), so that no square over- or underflows. Exact, as no
      // channel becomes subnormal that was not.
      const int exponent = ilogbf(amax);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
#pragma unroll
        for (int i = 0; i < 4; ++i) row.x[q][i] = ldexpf(row.x[q][i], -exponent);
      }
      const double squared = norm_squared(row);
      store_row(row, args.residuals + int64_t{slot} * head_dim,
                args.rounded + int64_t{slot} * head_dim, head_dim, lane);
      if (lane == 0) args.slots[slot] = {squared, exponent};
    } else {
      const LaneCoefficients none{.values = {0, 0}, .exponent = 0, .finite = is_finite};
      finish_vector(p, vector_idx, 0, none, is_finite ? 0.0f : NAN, lane);
    }
  }
  keep_slots(args, 0, slot, is_kept, reinterpret_cast<int*>(dynamic_smem()));
}

}  // namespace kvcore::lexico
