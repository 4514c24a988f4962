// Exponentials of attention, and the softmax state of a row that partial results merge by.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore {

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

/// p * 2^n for p in [0.25, 2] and integral n in [-126, 0]: exact, on the exponent's bits.
__device__ __forceinline__ float scale_pow2(float p, int n) {
  return __uint_as_float(__float_as_uint(p) + (static_cast<unsigned>(n) << 23));
}

/// SAS(x) for x <= 0: 2^-n * poly(f) with -x log2(e) = n + f; 0 below the threshold, which is at
/// least -87. The operations, in order, are those of the CPU kernels: the same bits. NaN stays.
__device__ __forceinline__ float sas(float x, float threshold) {
  const float y = __fmul_rn(x, 1.44269504f);
  const float n = ceilf(y);
  const float f = __fsub_rn(n, y);
  float p = __fmaf_rn(-0.039616f, f, 0.231159f);
  p = __fmaf_rn(p, f, -0.691588f);
  p = __fmaf_rn(p, f, 1.0f);
  return x < threshold ? 0.0f : scale_pow2(p, __float2int_rn(n));
}

/// e^x for x <= 0, relative error below 2^-22; 0 below -87. The CPU kernels' bits. NaN stays.
__device__ __forceinline__ float exp_nonpositive(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;  // not fmaxf, which would hide NaN
  const float n = rintf(__fmul_rn(bounded, 1.44269504f));
  // ln 2 in two parts, the first short enough for its product with n to be exact.
  float r = __fmaf_rn(n, -0.693359375f, bounded);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  // (e^r - 1) / r, minimax on |r| <= ln(2) / 2 for the relative error of e^r.
  float p = 1.384360358e-03f;
  p = __fmaf_rn(p, r, 8.374196405e-03f);
  p = __fmaf_rn(p, r, 4.166800483e-02f);
  p = __fmaf_rn(p, r, 1.666643079e-01f);
  p = __fmaf_rn(p, r, 4.999999419e-01f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  return x < -87.0f ? 0.0f : scale_pow2(p, __float2int_rn(n));
}

/// Running maximum and sum of exponentials of one row. Merging is what split attention does:
/// out = sum of out_i * weight_i over the parts.
struct RowState {
  float m;  // -inf: no key seen, and then l is 0
  float l;  // sum of e^(score - m)

  static __device__ __forceinline__ RowState empty() { return {negative_infinity(), 0.0f}; }

  /// Raises the maximum to at least `score_max` and scales l. Returns the factor for whatever else
  /// was summed so far. -inf - -inf would be NaN, so an empty row has factor 1.
  __device__ __forceinline__ float raise(float score_max) {
    const float next = score_max > m ? score_max : m;
    const float decay = next == m ? 1.0f : exp_nonpositive(m - next);
    m = next;
    l = __fmul_rn(l, decay);
    return decay;
  }

  /// The maximum to subtract from scores: 0 while no key was seen.
  __device__ __forceinline__ float base() const { return m == negative_infinity() ? 0.0f : m; }

  /// Natural logarithm of the sum of exponentials; -inf if no key was seen.
  __device__ __forceinline__ float lse() const {
    return l > 0.0f || l != l ? m + logf(l) : negative_infinity();
  }
};

}  // namespace kvcore
