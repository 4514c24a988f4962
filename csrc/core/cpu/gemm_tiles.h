// Products of bf16 pairs by AMX tiles: what gemm.h's product does at level amx. A tile instruction
// adds 32 products to each of 16 x 16 sums in its own order (see amx.h), so results differ in their
// last bits from those of the other levels, but not with how a caller splits rows and columns.
#pragma once

#include "core/cpu/amx.h"
#include "core/cpu/product.h"

namespace kvcore::KVCORE_ISA {

// Which tile holds what: sums of up to 2 x 2 tiles, one tile of each operand, and half of one.
constexpr int kSumTile = 0, kATile = 4, kBTile = 5, kATail = 6, kBTail = 7;

// Not an object whose destructor releases the tiles: that would leave symbols for exceptions, which
// nothing here throws, outside of the level's namespace.

/// Before products of bf16 on a thread.
inline void begin_products() {
  TileConfig config;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    config.rows[tile] = kTileMaxRows;
    config.row_bytes[tile] = kTileMaxBytes;
  }
  // Inner sizes are multiples of 16, a full tile takes 32.
  config.row_bytes[kATail] = kTileMaxBytes / 2;
  config.rows[kBTail] = kTileMaxRows / 2;
  tile_config(config);
}
/// After the last of them.
inline void end_products() { tile_release(); }

namespace detail {

constexpr int kTileSize = 16;   // rows and columns of a tile of sums
constexpr int kTileInner = 32;  // values of a full tile's row
constexpr int kBytesPerPair = 4;

/// Adds one step along the inner index. Operands are loaded in an order that needs one tile each.
template <int kA, int kB, bool kTwoRows, bool kTwoColumns>
inline void add_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride) {
  constexpr int kSum = kSumTile;
  const int64_t a_bytes = a_stride * kBytesPerPair, b_bytes = b_stride * kBytesPerPair;
  tile_load<kA>(a, a_bytes);
  tile_load<kB>(b, b_bytes);
  tile_dot_bf16<kSum, kA, kB>();
  if constexpr (kTwoColumns) {
    tile_load<kB>(b + kTileSize, b_bytes);
    tile_dot_bf16<kSum + 1, kA, kB>();
  }
  if constexpr (kTwoRows) {
    tile_load<kA>(a + kTileSize * a_stride, a_bytes);
    if constexpr (kTwoColumns) {
      tile_dot_bf16<kSum + 3, kA, kB>();
      tile_load<kB>(b, b_bytes);
    }
    tile_dot_bf16<kSum + 2, kA, kB>();
  }
}

/// One tile of sums to C.
template <int kTile>
inline void store_sums(float* c, int64_t c_stride, Onto onto) {
  if (onto.scale == nullptr) return tile_store<kTile>(c, c_stride * sizeof(float));
  alignas(64) float sums[kTileSize * kTileSize];
  tile_store<kTile>(sums, kTileSize * sizeof(float));
  for (int i = 0; i < kTileSize; ++i) {
    float* const row = c + i * c_stride;
    store(row, fma(load(row), splat(onto.scale[i * onto.stride]), load(sums + i * kTileSize)));
  }
}

template <bool kTwoRows, bool kTwoColumns>
inline void product_of_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                             int64_t b_stride, float* c, int64_t c_stride, int inner, Onto onto) {
  tile_zero<kSumTile>();
  if constexpr (kTwoColumns) tile_zero<kSumTile + 1>();
  if constexpr (kTwoRows) tile_zero<kSumTile + 2>();
  if constexpr (kTwoRows && kTwoColumns) tile_zero<kSumTile + 3>();
  for (; inner >= kTileInner; inner -= kTileInner) {
    add_tiles<kATile, kBTile, kTwoRows, kTwoColumns>(a, a_stride, b, b_stride);
    a += kTileInner / 2;
    b += kTileInner / 2 * b_stride;
  }
  if (inner > 0) {
    add_tiles<kATail, kBTail, kTwoRows, kTwoColumns>(a, a_stride, b, b_stride);
  }
  store_sums<kSumTile>(c, c_stride, onto);
  if constexpr (kTwoColumns) store_sums<kSumTile + 1>(c + kTileSize, c_stride, onto);
  if constexpr (kTwoRows) {
    c += kTileSize * c_stride;
    if (onto.scale != nullptr) onto.scale += kTileSize * onto.stride;
    store_sums<kSumTile + 2>(c, c_stride, onto);
    if constexpr (kTwoColumns) store_sums<kSumTile + 3>(c + kTileSize, c_stride, onto);
  }
}

}  // namespace detail

/// As product in gemm.h, between begin_products and end_products. Strides count pairs, inner counts
/// values.
inline void product_by_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                             int64_t b_stride, float* c, int64_t c_stride, int rows, int columns,
                             int inner, Part part, Onto onto) {
  constexpr int kSize = detail::kTileSize;
  for (int i = 0; i < rows; i += 2 * kSize) {
    const bool two_rows = i + kSize < rows;
    const Range range = inner_range(part, i, i + (two_rows ? 2 : 1) * kSize, inner);
    const uint32_t* const a_tile = a + i * a_stride + range.begin / 2;
    const Onto tile_onto = onto.from_row(i);
    for (int j = 0; j < columns; j += 2 * kSize) {
      if (part == Part::kLowerC && j >= i + 2 * kSize) break;
      const bool two_columns = j + kSize < columns;
      auto* const product = two_rows ? (two_columns ? detail::product_of_tiles<true, true>
                                                    : detail::product_of_tiles<true, false>)
                                     : (two_columns ? detail::product_of_tiles<false, true>
                                                    : detail::product_of_tiles<false, false>);
      product(a_tile, a_stride, b + range.begin / 2 * b_stride + j, b_stride, c + i * c_stride + j,
              c_stride, range.end - range.begin, tile_onto);
    }
  }
}

}  // namespace kvcore::KVCORE_ISA
