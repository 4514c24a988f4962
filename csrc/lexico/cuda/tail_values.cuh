// The tail's part of the weights of V's atoms. Its pairs are not sorted, and sums of floats that
// come in any order would differ from run to run: they are sums of integers, whose order is free.
//
// An addend is p * scale * coefficient in units of a power of two, one for each row, chosen so that
// the sum of all addends' magnitudes is below 2^30: at most 2^-30 of that sum is lost with each.
#pragma once

#include "lexico/cuda/value_rows.cuh"

namespace kvcore::lexico {

template <int kRows>
struct TailValuesSmem {
  // [kRows, atoms of the part]: lanes with different atoms are in different banks.
  int weights[kTableBytes / 4];
  float to_units[kRows], from_units[kRows];
};

/// A unit of weights whose magnitudes sum up to `bound`; 0 if there is nothing to sum.
__device__ __forceinline__ float weight_unit(float bound) {
  if (!(bound > 0.0f)) return 0.0f;
  // Not so small that its inverse, or that times 2^30, would leave the normal numbers.
  return fmaxf(power_above(bound), 0x1p-80f) * 0x1p-30f;
}

/// Atoms [first_atom, end_atom) of weights [v_atoms, kRows]. first_tile: of the segment.
template <int kRows>
__device__ inline void add_tail(const ValueInput<kRows>& in, int64_t first_tile, int first_atom,
                                int end_atom, TailValuesSmem<kRows>& smem, float* weights) {
  const AttentionParams& p = in.args.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int atoms = end_atom - first_atom;
  for (int i = thread; i < atoms * kRows; i += kValueThreads) smem.weights[i] = 0;
  const uint8_t* const data =
      p.v_tail + (in.unit.head_idx(in.args) * p.v_tiles + first_tile) * tile_bytes(p.v_sparsity);
  const int begin = in.part.seen_begin(in.unit), end = in.part.seen_end(in.unit);
  // Calls f(token, tile) for each token that is seen.
  const auto each_token = [&](const auto& f) {
    for (int t = begin / kTileTokens + warp; t * kTileTokens < end; t += kValueWarps) {
      const int token = t * kTileTokens + lane;
      if (token < begin || token >= end) continue;
      f(token, tile_at(data + t * tile_bytes(p.v_sparsity), p.v_sparsity));
    }
  };
  const auto scale_of = [&](const Tile& tile) { return to_float(Half{tile.scale[lane]}); };

  float sums[kRows] = {}, bounds[kRows] = {};
  each_token([&](int token, const Tile& tile) {
    int magnitude = 0, largest = 0;
#pragma unroll 4
    for (int j = 0; j < tile.width; ++j) {
      magnitude += abs(tile.coefficient(j, lane));
      largest = max(largest, tile.index(j, lane));
    }
    const float scale = scale_of(tile);
    const RowFloats<kRows> e = in.exponentials(token, sums);
    if (largest >= p.v_atoms) report_error(in.args.error_flags, kErrorCodes);
    if (largest >= p.v_atoms || !is_finite(scale)) return in.poison(token);
    const float factor = fabsf(scale) * static_cast<float>(magnitude);
#pragma unroll
    for (int r = 0; r < kRows; ++r) bounds[r] = __fmaf_rn(e.x[r], factor, bounds[r]);
  });
  in.block_sums(sums);
  in.write_sums(sums);
  in.block_sums(bounds);
  if (thread < kRows) {
    float bound = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) bound = r == thread ? bounds[r] : bound;
    // A row of NaN scores has a bound of NaN, and is NaN by its sum of exponentials.
    const float unit = weight_unit(is_finite(bound) ? bound : 0.0f);
    smem.from_units[thread] = unit;
    smem.to_units[thread] = unit > 0.0f ? inverse_of_power(unit) : 0.0f;
  }
  __syncthreads();

  float ignored[kRows] = {};
  each_token([&](int token, const Tile& tile) {
    const float scale = scale_of(tile);
    if (!is_finite(scale)) return;
    RowFloats<kRows> e = in.exponentials(token, ignored);
#pragma unroll
    for (int r = 0; r < kRows; ++r) e.x[r] *= scale * smem.to_units[r];
#pragma unroll 4
    for (int j = 0; j < tile.width; ++j) {
      const int local = tile.index(j, lane) - first_atom;
      const float coefficient = static_cast<float>(tile.coefficient(j, lane));
      if (local < 0 || local >= atoms || coefficient == 0.0f) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // NaN becomes 0.
        atomicAdd(&smem.weights[r * atoms + local], __float2int_rn(e.x[r] * coefficient));
      }
    }
  });
  __syncthreads();
  for (int n = thread; n < atoms; n += kValueThreads) {
    RowFloats<kRows> result;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      result.x[r] = static_cast<float>(smem.weights[r * atoms + n]) * smem.from_units[r];
    }
    *reinterpret_cast<RowFloats<kRows>*>(weights + (first_atom + n) * kRows) = result;
  }
  __syncthreads();
  in.write_poison(weights + first_atom * kRows, 1);
}

}  // namespace kvcore::lexico
