// The softmax of one page for the rows of a 16-row tile that a lane takes part in: S to P8.
#pragma once

#include <limits>

#include "core/cuda/convert.cuh"
#include "core/cuda/online_softmax.cuh"
#include "core/cuda/reduce.cuh"
#include "turbo/cuda/fragments.cuh"
#include "turbo/params.h"

namespace kvcore::turbo {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

/// The threshold of scores as kernels have them, times log2(e).
inline float score_threshold(const Softmax& softmax) {
  return softmax.exact ? -std::numeric_limits<float>::infinity() : softmax.sas_threshold * kLog2e;
}

/// Scores are kept times log2(e), since the hardware's exponential is that of 2. It is also what
/// stands for SAS's 2^-n * poly(f): within the 9e-5 by which poly differs from 2^-f, and in the
/// time of one instruction where poly takes seven.
/// kHalves: 2, or 1 where rows 8 to 15 of the tile hold no query.
template <int kHalves>
struct LaneRows {
  float m[kHalves];  // running maximum, -inf before the first key
  float l[kHalves];  // this lane's part of the sum of P; NaN once the row is poisoned

  /// NaN from now on for those rows of [first_row, ..) that see a key of the page.
  template <class Rows>
  __device__ __forceinline__ void poison(const Rows& rows, int row, int64_t first_key) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (rows.sees_page(row + 8 * h, first_key)) l[h] = quiet_nan();
    }
  }
};

/// What a page adds to O: decay * O + weight * s_V * (P8 . V8).
template <int kHalves>
struct PageWeights {
  uint32_t p8[kChunksOfPage][4];  // A fragments; rows 8 to 15 are 0 with one half
  float decay[kHalves];
  float weight[kHalves];  // p_max / 119
};

/// 0 below the threshold, which is -inf for exact exponentials.
__device__ __forceinline__ float probability(float x, float threshold) {
  return x < threshold ? 0.0f : exp2_approx(x);
}

/// Four integers that `rounded` holds in the low bytes of its bits.
__device__ __forceinline__ uint32_t pack_codes(const float (&rounded)[4]) {
  return __byte_perm(__byte_perm(__float_as_uint(rounded[0]), __float_as_uint(rounded[1]), 0x0040),
                     __byte_perm(__float_as_uint(rounded[2]), __float_as_uint(rounded[3]), 0x0040),
                     0x5410);
}

/// What page_softmax asks of a row: a score is S8 * factor, which is not negative; with a mask the
/// row sees tokens [first, end) of the page.
struct PageRow {
  float factor;
  int first, end;
};

/// kMasked: some row of the tile does not see the whole page. page_row(h): the PageRow of row
/// g + 8 h. Returns whether a row of this lane has a P above zero.
template <bool kMasked, int kHalves, class GetRow>
__device__ __forceinline__ bool page_softmax(const Scores& scores, const GetRow& page_row,
                                             float threshold, LaneIndex lane,
                                             LaneRows<kHalves>& rows, PageWeights<kHalves>& page) {
  bool any = false;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const PageRow row = page_row(h);
    const float factor = row.factor;
    float x[kChunksOfPage][2][kFragments];
    float top = negative_infinity();
#pragma unroll
    for (int j = 0; j < kChunksOfPage; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          float value = sum_value(scores.s[j][i][2 * h + e]);
          if constexpr (kMasked) {
            const int token = score_token(lane, j, i, e);
            value = token >= row.first && token < row.end ? value * factor : negative_infinity();
          }
          x[j][e][i] = value;
          top = fmaxf(top, value);
        }
      }
    }
    top = warp_max<4>(top);
    if constexpr (!kMasked) {
      // Scores are multiplied below without rounding the product: the maximum is rounded up, so
      // that none exceeds it, however large it is.
      top = top * factor;
      top = __fmaf_rn(fabsf(top), 0x1p-23f, top);
    }
    const float m = fmaxf(rows.m[h], top);
    // A row that has seen no key keeps -inf, and -inf - -inf would poison it with NaN.
    const float base = m == negative_infinity() ? 0.0f : m;
    page.decay[h] = exp2_approx(rows.m[h] - base);
    rows.m[h] = m;
    // exp2 rises with its argument, so that the largest P is that of the largest score.
    const float p_max = probability(top - base, threshold);
    const float to_code = p_max > 0.0f ? kCodeMax * rcp_approx(p_max) : 0.0f;
    page.weight[h] = p_max * (1.0f / kCodeMax);
    any |= p_max > 0.0f;

    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunksOfPage; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float rounded[kFragments];
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          const float below = kMasked ? x[j][e][i] - base : __fmaf_rn(x[j][e][i], factor, -base);
          const float p = probability(below, threshold);
          sum += p;
          rounded[i] = __fmaf_rn(p, to_code, kSumBiasValue);
        }
        page.p8[j][2 * e + h] = pack_codes(rounded);
        if constexpr (kHalves == 1) page.p8[j][2 * e + 1] = 0;
      }
    }
    rows.l[h] = __fmaf_rn(page.decay[h], rows.l[h], sum);
  }
  return any;
}

}  // namespace kvcore::turbo
