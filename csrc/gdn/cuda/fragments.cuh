// Sums of matrix products in a warp's registers, and products of fp32 numbers in tf32.
//
// Sums are D fragments, tiles of 16 rows and 8 columns: lane 4 g + t holds row g (elements 0, 1)
// and g + 8 (2, 3), columns 2 t and 2 t + 1. A D fragment is the A fragment of the next product as
// it is, once 2 t and 2 t + 1 take the places of t and t + 4 in what is summed over: B follows.
//
// Tf32 of two parts splits a number into its tf32 and that of the rest, and multiplies three of the
// four pairs: relative errors of 2^-21, nearly as in fp32. One part is rounded once, 2^-12.
#pragma once

#include <type_traits>

#include "core/cuda/convert.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/recompute.cuh"
#include "gdn/layout.h"

namespace kvcore::gdn {

constexpr int kTileTokens = 8;
constexpr int kTokenTiles = kChunk / kTileTokens;

using Tile = float[4];

struct LaneIndex {
  int g, t;
  __device__ __forceinline__ explicit LaneIndex(int lane) : g(lane / 4), t(lane % 4) {}
};
/// This thread's place in its warp, and its warp's in the CTA, anew wherever they are asked for:
/// addresses that follow from them would fill the registers. Unsigned until then: of a number that
/// might be negative, each quotient and remainder takes several instructions.
__device__ __forceinline__ int recomputed_lane() {
  return static_cast<int>(recompute(threadIdx.x) % kWarpSize);
}
__device__ __forceinline__ int recomputed_warp() {
  return static_cast<int>(recompute(threadIdx.x) / kWarpSize);
}

__device__ __forceinline__ float2 load_pair(const void* smem) {
  return *static_cast<const float2*>(smem);
}

/// Three instructions, where to_tf32 alone is as many: it looks for NaN, whose bits may overflow
/// here, but whose rest is NaN all the same. The rest is not rounded: products cut off what tf32
/// has not.
__device__ __forceinline__ void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

/// An A fragment of tf32.
template <int kParts>
struct Tf32A {
  uint32_t high[4], low[4];

  Tf32A() = default;
  /// Of a D fragment.
  __device__ __forceinline__ explicit Tf32A(const Tile& d) { set(d[0], d[2], d[1], d[3]); }

  __device__ __forceinline__ void set(float x0, float x1, float x2, float x3) {
    const float x[4] = {x0, x1, x2, x3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Anew for each product: the parts of several tiles would not fit the registers.
      const float own = __int_as_float(recompute(__float_as_int(x[i])));
      if constexpr (kParts == 2) {
        split_tf32(own, high[i], low[i]);
      } else {
        high[i] = to_tf32(own);
      }
    }
  }
};

/// sum += A * B. With one part B is tf32 already.
template <int kParts>
__device__ __forceinline__ void multiply_tf32(Tile& sum, const Tf32A<kParts>& a, uint32_t b0,
                                              uint32_t b1) {
  if constexpr (kParts == 1) {
    mma_m16n8k8_tf32(sum, a.high, {b0, b1});
  } else {
    uint32_t high[2], low[2];
    split_tf32(__uint_as_float(b0), high[0], low[0]);
    split_tf32(__uint_as_float(b1), high[1], low[1]);
    mma_m16n8k8_tf32(sum, a.high, low);
    mma_m16n8k8_tf32(sum, a.low, high);
    mma_m16n8k8_tf32(sum, a.high, high);
  }
}

/// sum += A * B, whatever B is.
template <int kParts>
__device__ __forceinline__ void multiply_floats(Tile& sum, const Tf32A<kParts>& a, float b0,
                                                float b1) {
  if constexpr (kParts == 1) {
    multiply_tf32(sum, a, to_tf32(b0), to_tf32(b1));
  } else {
    multiply_tf32(sum, a, __float_as_uint(b0), __float_as_uint(b1));
  }
}

/// f<0>(), ..., f<kCount - 1>(), as constants: tiles are in registers, which have no index.
template <int kCount, int kFirst = 0, class F>
__device__ __forceinline__ void for_each_constant(const F& f) {
  if constexpr (kFirst < kCount) {
    f(std::integral_constant<int, kFirst>{});
    for_each_constant<kCount, kFirst + 1>(f);
  }
}

}  // namespace kvcore::gdn
