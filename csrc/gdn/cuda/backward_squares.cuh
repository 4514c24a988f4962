// Products of a warp over squares of kChunk x kChunk fp32 in shared memory: what the kernels of the
// scan's backward are made of.
//
// A warp has 16 rows of sums (fragments.cuh): tile n holds columns [8 n, + 8). kParts: operands
// have one part (for bf16 inputs: an eighth of bf16's rounding) or two (for fp32 and fp16).
#pragma once

#include "gdn/cuda/fragments.cuh"
#include "gdn/cuda/heuristics.h"
#include "gdn/cuda/panels.cuh"

namespace kvcore::gdn::backward {

constexpr int kWarps = kBackwardThreads / kWarpSize;
constexpr int kTiles = kTokenTiles;
static_assert(kWarps * 16 == kChunk);
// Rows of a square in shared memory: the pairs that a warp reads from eight rows lie in different
// banks.
constexpr int kStride = kChunk + 8;
constexpr int kSquareFloats = kChunk * kStride;

using Rows = Tile[kTiles];  // of a warp: [16, kChunk]
using Block = gdn::Block<float>;

__device__ __forceinline__ LaneIndex lane_of_warp() { return LaneIndex(recomputed_lane()); }
/// Row, of 16, and column of element e of tile n.
__device__ __forceinline__ int row_of(LaneIndex lane, int e) { return lane.g + e / 2 * 8; }
__device__ __forceinline__ int column_of(LaneIndex lane, int n, int e) {
  return 8 * n + 2 * lane.t + e % 2;
}

__device__ __forceinline__ void clear(Rows& rows) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) rows[n][e] = 0.0f;
  }
}

/// What a square's rows stand for in a product: its columns (A * square^T), or what is summed over.
enum class RowsAre { kColumns, kInner };

/// sums[n - first] += a * (columns [8 n, + 8) of the square or of its transpose), n in [first,
/// end), for the inner tile k.
template <int kParts, RowsAre kRows>
__device__ __forceinline__ void multiply_step(Tile* sums, const Tile& a, const float* square, int k,
                                              int first, int end) {
  const Tf32A<kParts> operand(a);
  const LaneIndex lane = lane_of_warp();
  const float* const own = kRows == RowsAre::kColumns
                               ? square + lane.g * kStride + 8 * k + 2 * lane.t
                               : square + (8 * k + 2 * lane.t) * kStride + lane.g;
#pragma unroll
  for (int n = first; n < kTiles; ++n) {
    if (n >= end) break;
    if constexpr (kRows == RowsAre::kColumns) {
      const float2 b = *reinterpret_cast<const float2*>(own + 8 * n * kStride);
      multiply_floats(sums[n - first], operand, b.x, b.y);
    } else {
      multiply_floats(sums[n - first], operand, own[8 * n], own[8 * n + kStride]);
    }
  }
}

/// sums += a * square: `inner` and `columns` are tiles of 8 that are not all zero. tile_of(k, tile)
/// brings tile k of a, when it is needed.
template <int kParts, RowsAre kRows, class F>
__device__ __forceinline__ void multiply_tiles(Tile* sums, const F& tile_of, const float* square,
                                               int inner, int columns) {
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    if (k >= inner) break;
    Tile tile;
    tile_of(k, tile);
    multiply_step<kParts, kRows>(sums, tile, square, k, 0, columns);
  }
}
template <int kParts, RowsAre kRows>
__device__ __forceinline__ void multiply(Tile* sums, const Tile* a, const float* square, int inner,
                                         int columns) {
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    if (k >= inner) break;
    multiply_step<kParts, kRows>(sums, a[k], square, k, 0, columns);
  }
}

/// x <- x * square, the square being lower triangular. In place, half by half: that which needs all
/// of x first.
template <int kParts, RowsAre kRows>
__device__ __forceinline__ void multiply_triangle(Rows& x, const float* square) {
  constexpr int kHalf = kTiles / 2;
  constexpr bool kLower = kRows == RowsAre::kColumns;  // tokens need earlier ones, or later ones
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = (half == 0) == kLower ? kHalf : 0;
    Tile sums[kHalf] = {};
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (half == 1 && (k < kHalf) != kLower) continue;
      multiply_step<kParts, kRows>(sums, x[k], square, k, first, first + kHalf);
    }
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[first + n][e] = sums[n][e];
    }
  }
}

/// Tile n of the warp's rows [16 warp, + 16) of a block, from memory.
__device__ __forceinline__ void load_tile(const Block& block, int warp, int n, Tile& tile) {
  const LaneIndex lane = lane_of_warp();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + lane.g + 8 * h, column = column_of(lane, n, 0);
    float2 pair = make_float2(0.0f, 0.0f);
    if (row < block.rows && column < block.columns) {
      pair = *reinterpret_cast<const float2*>(block.first + row * block.stride + column);
    }
    tile[2 * h] = pair.x;
    tile[2 * h + 1] = pair.y;
  }
}
__device__ __forceinline__ void load_rows(const Block& block, int warp, Rows& rows) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) load_tile(block, warp, n, rows[n]);
}

/// Tile n of rows [16 warp, + 16) of a square in shared memory or, transposed, of these columns.
template <bool kTransposed>
__device__ __forceinline__ void read_tile(const float* square, int warp, int n, Tile& tile) {
  const LaneIndex lane = lane_of_warp();
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = 16 * warp + row_of(lane, e), column = column_of(lane, n, e);
    tile[e] = square[kTransposed ? column * kStride + row : row * kStride + column];
  }
}
__device__ __forceinline__ void write_rows(const Rows& rows, int warp, float* square) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const LaneIndex lane = lane_of_warp();
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      square[(16 * warp + row_of(lane, e)) * kStride + column_of(lane, n, e)] = rows[n][e];
    }
  }
}

__device__ __forceinline__ void copy_block(float* square, const Block& block) {
  constexpr int kUnits = kChunk * static_cast<int>(sizeof(float)) / kUnitBytes;
  copy_units<kBackwardThreads, kUnits>(
      static_cast<int>(recompute(threadIdx.x)), reinterpret_cast<uint8_t*>(square), block, 0,
      [](int row, int byte) { return row * kStride * static_cast<int>(sizeof(float)) + byte; });
}

/// The squares that a CTA needs, one after the other: kHeld of them can be used, the others of
/// kSlots are on their way.
template <int kSlots, int kHeld, class BlockOfStep>
class Ring {
 public:
  static constexpr int kAhead = kSlots - kHeld;

  /// block_of_step(i, block) sets the i-th block and returns whether there is one: it is asked for
  /// kAhead more than that.
  __device__ Ring(float* slots, const BlockOfStep& block_of_step)
      : slots_(slots), block_of_step_(block_of_step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) begin_next();
  }

  /// The next square; the one kHeld before may be overwritten. A barrier.
  __device__ const float* next() {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    begin_next();
    return slots_ + (step_ + kHeld - 1) % kSlots * kSquareFloats;
  }

 private:
  __device__ void begin_next() {
    Block block;
    if (block_of_step_(step_, block)) {
      copy_block(slots_ + step_ % kSlots * kSquareFloats, block);
    }
    ++step_;
    cp_async_commit();
  }

  float* slots_;
  int step_ = 0;
  const BlockOfStep& block_of_step_;
};

}  // namespace kvcore::gdn::backward
