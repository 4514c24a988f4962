// U = scale Q D_k^T: the products of every query row and every atom of K.
//
// grid: one CTA for 64 atoms and 32 rows of any units; warp w has rows 4 w to 4 w + 3, lane l the
// atoms l and l + 32. Exact fp32: with tf32 the scores would be off by 1e-3 of their size.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/reduce.cuh"
#include "lexico/cuda/attention_args.cuh"

namespace kvcore::lexico {

constexpr int kTablesThreads = 256;
constexpr int kTablesWarps = kTablesThreads / kWarpSize;
static_assert(kProductRows == 4 * kTablesWarps && kProductAtoms == 2 * kWarpSize);

struct TablesSmem {
  // Padded: a warp writes 32 channels of one row or atom.
  alignas(16) float queries[kWarpSize][kProductRows + 4];
  float atoms[kWarpSize][kProductAtoms + 1];
};

__global__ void __launch_bounds__(kTablesThreads)
    tables_kernel(const __grid_constant__ AttentionArgs args, int atom_chunks) {
  TablesSmem& smem = *reinterpret_cast<TablesSmem*>(dynamic_smem());
  const AttentionParams& p = args.p;
  const int rows = kUnitRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first_atom = int64_t{blockIdx.x % atom_chunks} * kProductAtoms;
  const int64_t first_row = int64_t{blockIdx.x / atom_chunks} * kProductRows;
  const int64_t all_rows = args.num_units * rows;

  // A warp reads rows warp, warp + 8, ... of the queries.
  constexpr int kOwnRows = kProductRows / kTablesWarps;
  int64_t at[kOwnRows];
  float poison[kOwnRows] = {};
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const int64_t row = first_row + warp + i * kTablesWarps;
    at[i] = -1;
    if (row >= all_rows) continue;
    const Unit unit = make_unit(args, row / rows);
    const int r = static_cast<int>(row % rows);
    if (r >= unit.num_rows) continue;
    at[i] = unit.batch_idx * p.q.batch_stride + unit.q_head(args, r) * p.q.head_stride +
            unit.token(args, r) * p.q.token_stride;
  }
  float sums[2][4] = {};
  for (int64_t first = 0; first < p.head_dim; first += kWarpSize) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int local = warp + i * kTablesWarps;
      float x = 0.0f;
      if (at[i] >= 0) {
        x = load_element(p.q, at[i] + (first + lane) * p.q.channel_stride) * p.scale;
      }
      poison[i] += x * 0.0f;
      smem.queries[lane][local] = x;
      if (first_atom == 0 && first_row + local < all_rows) {
        args.queries[(first_row + local) * p.head_dim + first + lane] = x;
      }
    }
    for (int n = warp; n < kProductAtoms; n += kTablesWarps) {
      const int64_t atom = min(first_atom + n, p.k_atoms - 1);
      smem.atoms[lane][n] = p.k_dictionary[atom * p.head_dim + first + lane];
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kWarpSize; ++k) {
      const float4 q = *reinterpret_cast<const float4*>(&smem.queries[k][4 * warp]);
      const float q4[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float d = smem.atoms[k][lane + n * kWarpSize];
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[n][r] = __fmaf_rn(q4[r], d, sums[n][r]);
      }
    }
  }

  if (first_atom == 0) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int64_t row = first_row + warp + i * kTablesWarps;
      const float bad = warp_sum(poison[i]);
      // A query that is not finite is NaN throughout: its scores of +-inf could pass for others.
      if (lane == 0 && row < all_rows) args.factors[row] = 1.0f + bad;
    }
  }
  const int64_t row = first_row + 4 * warp;
  if (row >= all_rows) return;
  const int64_t unit_idx = row / rows;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int64_t atom = first_atom + lane + n * kWarpSize;
    if (atom >= p.k_atoms) continue;
    float* const entry = args.tables + (unit_idx * p.k_atoms + atom) * rows + row % rows;
    *reinterpret_cast<float4*>(entry) = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
  }
}

}  // namespace kvcore::lexico
