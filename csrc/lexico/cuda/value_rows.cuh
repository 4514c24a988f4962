// What the three kinds of segments share in the pass over V: weights of tokens and their sums.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "lexico/cuda/attention_args.cuh"

namespace kvcore::lexico {

/// Of a CTA's rows; in shared memory.
template <int kRows>
struct ValueRows {
  RowsOfPart<kRows> keys;
  float base[kRows];       // maximum of the scores, 0 if there is none
  unsigned poison[kRows];  // not 0: a value that the row sees is not finite, or
                           // no value at all
  float scratch[kValueWarps][kRows];
};

template <int kRows>
struct ValueInput {
  const AttentionArgs& args;
  const Unit& unit;
  const Part& part;
  const float* scores;  // [tokens, kRows]
  float* sums;          // [kRows] of exponentials, null for all but one CTA of a segment
  ValueRows<kRows>& rows;

  /// exp(score - max) of a token's rows, 0 where it is not seen; added to `sums`.
  __device__ __forceinline__ RowFloats<kRows> exponentials(int token,
                                                           float (&row_sums)[kRows]) const {
    RowFloats<kRows> p = {};
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) any = any || rows.keys.sees(r, token);
    if (!any) return p;
    const auto score = *reinterpret_cast<const RowFloats<kRows>*>(scores + token * kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rows.keys.sees(r, token)) p.x[r] = exp2_approx((score.x[r] - rows.base[r]) * kLog2e);
      row_sums[r] += p.x[r];
    }
    return p;
  }

  /// The rows that see a token will be NaN.
  __device__ void poison(int token) const {
    for (int r = 0; r < kRows; ++r) {
      // Every thread that writes it writes the same.
      if (rows.keys.sees(r, token)) atomicOr(&rows.poison[r], 1u);
    }
  }
  /// The rows that see any of the segment's tokens will be NaN.
  __device__ void poison_all() const {
    for (int r = 0; r < kRows; ++r) {
      if (rows.keys.begin[r] < rows.keys.end[r]) atomicOr(&rows.poison[r], 1u);
    }
  }

  /// Sums over the CTA, in a fixed order, in every thread. Behind a barrier.
  __device__ void block_sums(float (&x)[kRows]) const {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = warp_sum(x[r]);
      if (thread % kWarpSize == 0) rows.scratch[thread / kWarpSize][r] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = 0.0f;
      for (int w = 0; w < kValueWarps; ++w) x[r] += rows.scratch[w][r];
    }
  }
  __device__ void write_sums(const float (&x)[kRows]) const {
    if (sums == nullptr || threadIdx.x != 0) return;
    for (int r = 0; r < kRows; ++r) sums[r] = x[r];
  }

  /// Makes the poisoned rows NaN, from the first atom or channel of what the CTA wrote on. Behind a
  /// barrier that is behind the writes.
  __device__ void write_poison(float* entry, int64_t stride) const {
    const int r = static_cast<int>(threadIdx.x);
    if (r < kRows && rows.poison[r] != 0) entry[r * stride] = quiet_nan();
  }
};

}  // namespace kvcore::lexico
