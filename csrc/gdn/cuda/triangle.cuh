// The inverse of a chunk's triangular system, by a CTA of four warps.
//
// X = (I + L)^-1, L strictly lower triangular. Diagonal blocks of 16 are solved column by column, a
// thread each. Then twice, for blocks of 16 and of 32: the inverse of [[a, 0], [l, b]] has
// -(b^-1 l) a^-1 below its diagonal blocks. b^-1 l stays in registers, as the A fragment of the
// second product. Everything is fp32, or tf32 in two parts, which is nearly as exact.
#pragma once

#include "gdn/cuda/operands.cuh"

namespace kvcore::gdn {

constexpr int kTriangleThreads = 128;
constexpr int kDiagonalBlock = 16;
// Rows of squares: float4 loads are aligned, eight rows' first elements are in different banks.
constexpr int kSquareStride = kChunk + 4;
constexpr int kSquareFloats = kChunk * kSquareStride;

/// Blocks on the diagonal; thread counts from 0 to kChunk.
__device__ inline void invert_diagonal_block(const float* l, float* x, int thread) {
  const int first = thread / kDiagonalBlock * kDiagonalBlock, column = thread % kDiagonalBlock;
  const float* const l_block = l + first * kSquareStride + first;
  float* const x_column = x + first * kSquareStride + first + column;
  float own[kDiagonalBlock];
#pragma unroll
  for (int i = 0; i < kDiagonalBlock; ++i) own[i] = i == column ? 1.0f : 0.0f;
  x_column[0] = own[0];
#pragma unroll
  for (int i = 1; i < kDiagonalBlock; ++i) {
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 row = *reinterpret_cast<const float4*>(l_block + i * kSquareStride + j);
      // Where j reaches i, L is zero and own[j] what it began as.
      own[i] = __fmaf_rn(-row.x, own[j], own[i]);
      if (j + 1 < i) own[i] = __fmaf_rn(-row.y, own[j + 1], own[i]);
      if (j + 2 < i) own[i] = __fmaf_rn(-row.z, own[j + 2], own[i]);
      if (j + 3 < i) own[i] = __fmaf_rn(-row.w, own[j + 3], own[i]);
    }
    x_column[i * kSquareStride] = own[i];
  }
}

/// sum += A * (rows [row, row + 8), columns [column, column + 8) of a square).
__device__ __forceinline__ void multiply_square(Tile& sum, const Tf32A<2>& a, const float* square,
                                                int row, int column) {
  const LaneIndex lane(static_cast<int>(threadIdx.x) % kWarpSize);
  const float* const at = square + (row + 2 * lane.t) * kSquareStride + column + lane.g;
  multiply_floats(sum, a, at[0], at[kSquareStride]);
}

/// The block below two inverted blocks of kSize that begin at `first`: rows [16 row_tile, + 16) and
/// tiles [column_tile, + kTiles) of it.
template <int kSize, int kTiles>
__device__ inline void merge_blocks(const float* l, float* x, int first, int row_tile,
                                    int column_tile) {
  constexpr int kInner = kSize / 8;
  const LaneIndex lane(static_cast<int>(threadIdx.x) % kWarpSize);
  const int middle = first + kSize, row = middle + 16 * row_tile;
  Tile product[kInner] = {};  // of x below and l, from the first column that is used on
#pragma unroll
  for (int k = 0; k < kInner; ++k) {
    if (k >= 2 * (row_tile + 1)) break;
    Tile d;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 pair =
          load_pair(x + (row + lane.g + 8 * h) * kSquareStride + middle + 8 * k + 2 * lane.t);
      d[2 * h] = pair.x;
      d[2 * h + 1] = pair.y;
    }
    const Tf32A<2> a(d);
#pragma unroll
    for (int n = 0; n < kInner; ++n) {
      if (n >= column_tile) multiply_square(product[n], a, l, middle + 8 * k, first + 8 * n);
    }
  }
  Tile sum[kTiles] = {};
#pragma unroll
  for (int k = 0; k < kInner; ++k) {
    if (k < column_tile) continue;
    const Tf32A<2> a(product[k]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (k < column_tile + i) continue;
      multiply_square(sum[i], a, x, first + 8 * k, first + 8 * (column_tile + i));
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* const at =
          x + (row + lane.g + 8 * h) * kSquareStride + first + 8 * (column_tile + i) + 2 * lane.t;
      *reinterpret_cast<float2*>(at) = make_float2(-sum[i][2 * h], -sum[i][2 * h + 1]);
    }
  }
}

/// X from L, [kChunk, kSquareStride] each. Of L the 16 x 16 blocks up to the diagonal are read,
/// with zeros above it, and of X they are written. Begins and ends with a barrier.
__device__ inline void invert_triangle(const float* l, float* x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  __syncthreads();
  if (threadIdx.x < kChunk) invert_diagonal_block(l, x, static_cast<int>(threadIdx.x));
  __syncthreads();
  merge_blocks<16, 1>(l, x, warp / 2 * 32, 0, warp % 2);
  __syncthreads();
  merge_blocks<32, 2>(l, x, 0, warp / 2, warp % 2 * 2);
  __syncthreads();
}

}  // namespace kvcore::gdn
