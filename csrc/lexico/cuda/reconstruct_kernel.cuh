// lexico_reconstruct: a warp takes a vector. Per vector it reads `sparsity` rows of the dictionary,
// 16 bytes a lane, from L2, and writes one row; it is for code that cannot work on the codes.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/rows.cuh"
#include "lexico/cuda/atom_rows.cuh"
#include "lexico/cuda/coefficients.cuh"

namespace kvcore::lexico {

constexpr int kReconstructWarps = 4;

/// Four channels of a row of any float type.
__device__ inline void store_output(const OutputView& out, int64_t row, int channel,
                                    const float (&x)[4]) {
  switch (out.dtype) {
    case Dtype::kFloat16:
      return store_channels(static_cast<Half*>(out.data) + row, channel, x);
    case Dtype::kBFloat16:
      return store_channels(static_cast<BFloat16*>(out.data) + row, channel, x);
    default:
      return store_channels(static_cast<float*>(out.data) + row, channel, x);
  }
}

__global__ void __launch_bounds__(kReconstructWarps* kWarpSize)
    reconstruct_kernel(const __grid_constant__ ReconstructParams p, uint32_t* error_flags) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t vector_idx = int64_t{blockIdx.x} * kReconstructWarps + threadIdx.x / kWarpSize;
  if (vector_idx >= p.batch * p.heads * p.tokens) return;
  const int sparsity = static_cast<int>(p.sparsity), head_dim = static_cast<int>(p.head_dim);
  constexpr int kQuads = kMaxHeadDim / 128;
  Row<kQuads> sum = {};
  bool is_valid = true;
  for (int first = 0; first < sparsity; first += kWarpSize) {
    const int64_t at = vector_idx * sparsity + first + lane;
    const bool is_pair = first + lane < sparsity;
    const int index = is_pair ? p.indices[at] : 0;
    const float value = is_pair ? load_coefficient(p.coefficients, p.coefficient_type, at) : 0.0f;
    if (__any_sync(kAllLanes, index < 0 || index >= p.atoms)) {
      if (lane == 0) report_error(error_flags, kErrorIndices);
      is_valid = false;
      break;
    }
#pragma unroll 4
    for (int j = 0; j < min(kWarpSize, sparsity - first); ++j) {
      const float factor = __shfl_sync(kAllLanes, value, j);
      const float* atom = p.dictionary + int64_t{__shfl_sync(kAllLanes, index, j)} * head_dim;
      add_row(sum, factor, load_row<kQuads>(atom, head_dim, lane));
    }
  }
  // Last, so that a scale of NaN reaches a vector without coefficients.
  const float scale = is_valid ? to_float(Half{p.scale[vector_idx]}) : NAN;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int channel = quad_channel(lane, q);
    if (channel >= head_dim) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.x[q][i] *= scale;
    store_output(p.out, vector_idx * head_dim, channel, sum.x[q]);
  }
}

}  // namespace kvcore::lexico
