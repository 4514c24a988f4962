// A page for many rows with AMX tiles: S8 = Q8 . K8 and P8 . V8 of up to 32 rows. Only at level
// amx; everything between the products is what the other levels do, so results are theirs, bit by
// bit.
//
// Both operands of a product of tiles are as they lie in memory: a row of Q8 or P8 is 64 bytes of
// the contracted dimension, and four of K's channels or V's tokens lie in a dword, which is how the
// second operand is wanted (layout.h).
#pragma once

#include "core/cpu/amx.h"
#include "turbo/cpu/softmax.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

// From so many rows on tiles are used. Counted for head_dim 128, two byte dot products of 512 bits
// and 16 rows of a tile product each needing 1 and 16 cycles; not measured: a page is 256 dot
// products a row, 128 cycles, or 16 tile products, 256 cycles, and as many again to load and store.
constexpr int kMinTileRows = 8;
constexpr int kAmxRows = 2 * kTileMaxRows;
static_assert(kTileRows % kAmxRows == 0 && kPageTokens == kTileMaxBytes);

// Which tile holds what. Of Q8 and P8, and of the sums, 16 rows each.
constexpr int kSum0 = 0, kSum1 = 1, kQ0 = 2, kQ1 = 3, kK = 4, kP0 = 5, kP1 = 6, kV = 7;
constexpr int kSumColumns = kTileMaxBytes / 4;  // tokens or channels of a sum

/// Channels of one product with K: as many as fit, and a divisor of head_dim, which can be 96.
constexpr int tile_channels(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

inline TileConfig tile_shapes(int head_dim) {
  TileConfig config;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    config.rows[tile] = kTileMaxRows;
    config.row_bytes[tile] = kTileMaxBytes;
  }
  const int channels = tile_channels(head_dim);
  config.row_bytes[kQ0] = config.row_bytes[kQ1] = static_cast<uint16_t>(channels);
  config.rows[kK] = static_cast<uint8_t>(channels / kInterleave);
  return config;
}

/// S8 of 16 rows, or of 32. Rows past the last of a tile are garbage in and garbage out.
/// codes: of 8-bit K; q8: [rows, head_dim]; s: [rows, 64].
template <bool kBoth>
inline void tile_scores(const uint8_t* codes, int head_dim, const int8_t* q8, int32_t* s) {
  const int channels = tile_channels(head_dim);
  for (int token = 0; token < kPageTokens; token += kSumColumns) {
    tile_zero<kSum0>();
    if constexpr (kBoth) tile_zero<kSum1>();
    for (int c = 0; c < head_dim; c += channels) {
      tile_load<kK>(codes + c * kPageTokens + token * kInterleave, kPageTokens * kInterleave);
      tile_load<kQ0>(q8 + c, head_dim);
      tile_dot<kSum0, kQ0, kK>();
      if constexpr (kBoth) {
        tile_load<kQ1>(q8 + kTileMaxRows * head_dim + c, head_dim);
        tile_dot<kSum1, kQ1, kK>();
      }
    }
    constexpr int64_t kRowBytes = kPageTokens * sizeof(int32_t);
    tile_store<kSum0>(s + token, kRowBytes);
    if constexpr (kBoth) tile_store<kSum1>(s + kTileMaxRows * kPageTokens + token, kRowBytes);
  }
}

/// O = decay * O + weight * (P8 . V8) of 16 rows, or of 32, of which num_rows exist.
/// codes: of 8-bit V; o: [num_rows, head_dim].
template <bool kBoth>
inline void tile_values(const uint8_t* codes, int head_dim, const PageUpdate<kAmxRows>& u,
                        int num_rows, float* o) {
  alignas(64) int32_t sums[kAmxRows * kSumColumns];
  constexpr int64_t kRowBytes = kSumColumns * sizeof(int32_t);
  tile_load<kP0>(u.p8, kPageTokens);
  if constexpr (kBoth) tile_load<kP1>(u.p8 + kTileMaxRows * kPageTokens, kPageTokens);
  for (int channel = 0; channel < head_dim; channel += kSumColumns) {
    tile_load<kV>(codes + channel * kInterleave, head_dim * kInterleave);
    tile_zero<kSum0>();
    tile_dot<kSum0, kP0, kV>();
    tile_store<kSum0>(sums, kRowBytes);
    if constexpr (kBoth) {
      tile_zero<kSum1>();
      tile_dot<kSum1, kP1, kV>();
      tile_store<kSum1>(sums + kTileMaxRows * kSumColumns, kRowBytes);
    }
    for (int r = 0; r < num_rows; ++r) {
      float* out = o + r * head_dim + channel;
      const F32 sum = to_f32(load_i32(sums + r * kSumColumns));
      store(out, fma(splat(u.weight[r]), sum, splat(u.decay[r]) * load(out)));
    }
  }
}

/// Rows [row, row + num_rows) of a tile and one 8-bit page; tiles are configured.
template <bool kBoth>
inline void attend_tiles(RowTile& tile, int row, int num_rows, const Page& page, float k_scale,
                         float v_scale, const Softmax& softmax) {
  PageUpdate<kAmxRows> u;
  const int head_dim = tile.head_dim;
  const int64_t codes = code_offset(8, head_dim);
  tile_scores<kBoth>(page.k + codes, head_dim, tile.q8 + row * head_dim, u.s);
  const bool any_p = softmax.exact
                         ? page_softmax<true>(tile, row, num_rows, page, k_scale, v_scale, 0.0f, u)
                         : page_softmax<false>(tile, row, num_rows, page, k_scale, v_scale,
                                               softmax.sas_threshold, u);
  if (any_p) tile_values<kBoth>(page.v + codes, head_dim, u, num_rows, tile.o + row * head_dim);
}

}  // namespace kvcore::turbo::KVCORE_ISA
