// Products of bf16 residuals and atoms with AMX tiles. Only at level amx.
//
// Both operands are as they lie in memory: 16 rows of residuals by 16 pairs of channels, and the
// same pairs of channels by 16 atoms of a panel.
#pragma once

#include "core/cpu/amx.h"
#include "core/cpu/vec.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

constexpr int kTilePairs = kTileMaxBytes / 4;  // of channels in a row of a tile
// All rows of a block share each tile of atoms: with 3 products for 4 loads it is the products, 16
// cycles each against 8, that take the time. Counted, not measured.
constexpr int kRowGroups = kRecomputeBlock / kTileMaxRows;
static_assert(kRowGroups == 3 && kRecomputeBlock % kTileMaxRows == 0 && kLanes == kTilePairs);

constexpr int kRows0 = 3, kRows1 = 4, kRows2 = 5, kAtoms = 6;  // sums are tiles 0 to 2

/// Configures the tiles; tile_release() follows the last product. No object does this: its
/// destructor would leave code for exceptions outside the level's namespace.
inline void configure_search_tiles() {
  TileConfig config;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    config.rows[tile] = kTileMaxRows;
    config.row_bytes[tile] = kTileMaxBytes;
  }
  tile_config(config);
}

/// A row [head_dim] rounded to bf16.
inline void round_row(const float* row, int head_dim, int16_t* bits) {
  for (int i = 0; i < head_dim; i += 2 * kLanes) {
    const __m512bh both = _mm512_cvtne2ps_pbh(load(row + i + kLanes), load(row + i));
    _mm512_storeu_si512(bits + i, (__m512i)both);
  }
}

/// products [kRecomputeBlock, kLanes] of `num_groups` groups of 16 rows [.., head_dim] and the
/// kLanes atoms that begin at `panel`, [head_dim / 2, kPanelAtoms, 2].
inline void correlate_tiles(const int16_t* rows, int num_groups, const int16_t* panel, int head_dim,
                            float* products) {
  constexpr int kTileChannels = 2 * kTilePairs;
  constexpr int64_t kPanelBytes = kPanelAtoms * 2 * int64_t{sizeof(int16_t)};
  const int64_t row_bytes = head_dim * int64_t{sizeof(int16_t)};
  constexpr int64_t kSumBytes = kLanes * sizeof(float);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  for (int i = 0; i < head_dim; i += kTileChannels) {
    tile_load<kAtoms>(panel + i * kPanelAtoms, kPanelBytes);
    tile_load<kRows0>(rows + i, row_bytes);
    tile_dot_bf16<0, kRows0, kAtoms>();
    if (num_groups > 1) {
      tile_load<kRows1>(rows + kTileMaxRows * head_dim + i, row_bytes);
      tile_dot_bf16<1, kRows1, kAtoms>();
    }
    if (num_groups > 2) {
      tile_load<kRows2>(rows + 2 * kTileMaxRows * head_dim + i, row_bytes);
      tile_dot_bf16<2, kRows2, kAtoms>();
    }
  }
  tile_store<0>(products, kSumBytes);
  if (num_groups > 1) tile_store<1>(products + kTileMaxRows * kLanes, kSumBytes);
  if (num_groups > 2) tile_store<2>(products + 2 * kTileMaxRows * kLanes, kSumBytes);
}

}  // namespace kvcore::lexico::KVCORE_ISA
