// The outputs of a vector that is done.
#pragma once

#include "lexico/cuda/coefficients.cuh"
#include "lexico/cuda/encode_args.cuh"

namespace kvcore::lexico {

/// Zeros behind `count` atoms, whose indices are there already; coefficients, scale and residual.
/// All lanes call it together.
__device__ inline void finish_vector(const EncodeParams& p, int64_t vector_idx, int count,
                                     const LaneCoefficients& coefficients, float residual,
                                     int lane) {
  for (int j = count + lane; j < p.sparsity; j += kWarpSize) {
    p.indices[vector_idx * p.sparsity + j] = 0;
  }
  store_coefficients(p, coefficients, vector_idx, lane);
  if (lane == 0) p.residual[vector_idx] = residual;
}

}  // namespace kvcore::lexico
