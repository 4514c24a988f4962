// Rows of head_dim floats that a warp holds, four neighbouring channels to a lane and 128 channels
// further on the next four; lanes past the end hold zeros.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/copy.cuh"
#include "core/cuda/reduce.cuh"

namespace kvcore::lexico {

template <int kQuads>
struct Row {
  float x[kQuads][4];
};

/// The first channel of a lane's quad.
__device__ __forceinline__ int quad_channel(int lane, int quad) { return 4 * lane + 128 * quad; }

template <int kQuads>
__device__ __forceinline__ Row<kQuads> load_row(const float* row, int head_dim, int lane) {
  Row<kQuads> out;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int channel = quad_channel(lane, q);
    const uint4 bits = channel < head_dim ? load_16(row + channel) : uint4{0, 0, 0, 0};
    out.x[q][0] = __uint_as_float(bits.x);
    out.x[q][1] = __uint_as_float(bits.y);
    out.x[q][2] = __uint_as_float(bits.z);
    out.x[q][3] = __uint_as_float(bits.w);
  }
  return out;
}

/// To a row of floats and, rounded, to one of bf16.
template <int kQuads>
__device__ __forceinline__ void store_row(const Row<kQuads>& in, float* row, BFloat16* rounded,
                                          int head_dim, int lane) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int channel = quad_channel(lane, q);
    if (channel >= head_dim) continue;
    const auto& x = in.x[q];
    store_16(row + channel, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                             __float_as_uint(x[3])});
    *reinterpret_cast<uint2*>(rounded + channel) = {pack_floats<BFloat16>(x[0], x[1]),
                                                    pack_floats<BFloat16>(x[2], x[3])};
  }
}

/// A lane's part of the product of two rows.
template <int kQuads>
__device__ __forceinline__ float dot_part(const Row<kQuads>& a, const Row<kQuads>& b) {
  float sum = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = __fmaf_rn(a.x[q][i], b.x[q][i], sum);
  }
  return sum;
}

/// a += factor * b
template <int kQuads>
__device__ __forceinline__ void add_row(Row<kQuads>& a, float factor, const Row<kQuads>& b) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.x[q][i] = __fmaf_rn(factor, b.x[q][i], a.x[q][i]);
  }
}

/// The squared norm of a row, in fp64: tolerances are compared with it.
template <int kQuads>
__device__ __forceinline__ double norm_squared(const Row<kQuads>& row) {
  double sum = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double x = row.x[q][i];
      sum = __fma_rn(x, x, sum);
    }
  }
  return warp_sum(sum);
}

}  // namespace kvcore::lexico
