// Products of bf16 residuals and atoms with AMX tiles. Only at level amx.
//
// Both operands are as they lie in memory: 16 rows of residuals by 16 pairs of channels, and the
// same pairs of channels by 16 atoms of a panel.
#pragma once

#include "core/cpu/amx.h"
#include "lexico/cpu/correlate.h"

namespace kvcore::lexico::KVCORE_ISA {

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

/// products [kRecomputeBlock, kLanes] of `num_groups` groups of 16 rows [.., head_dim / 2] and the
/// kLanes atoms that begin at `panel`, [head_dim / 2, kPanelAtoms].
inline void correlate_tiles(const uint32_t* rows, int num_groups, const uint32_t* panel,
                            int head_dim, float* products) {
  const int num_pairs = head_dim / 2;
  const int64_t row_bytes = num_pairs * int64_t{sizeof(uint32_t)};
  constexpr int64_t kSumBytes = kLanes * sizeof(float);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  for (int i = 0; i < num_pairs; i += kTilePairs) {
    tile_load<kAtoms>(panel + i * kPanelAtoms, kPanelAtoms * int64_t{sizeof(uint32_t)});
    tile_load<kRows0>(rows + i, row_bytes);
    tile_dot_bf16<0, kRows0, kAtoms>();
    if (num_groups > 1) {
      tile_load<kRows1>(rows + kTileMaxRows * num_pairs + i, row_bytes);
      tile_dot_bf16<1, kRows1, kAtoms>();
    }
    if (num_groups > 2) {
      tile_load<kRows2>(rows + 2 * kTileMaxRows * num_pairs + i, row_bytes);
      tile_dot_bf16<2, kRows2, kAtoms>();
    }
  }
  tile_store<0>(products, kSumBytes);
  if (num_groups > 1) tile_store<1>(products + kTileMaxRows * kLanes, kSumBytes);
  if (num_groups > 2) tile_store<2>(products + 2 * kTileMaxRows * kLanes, kSumBytes);
}

}  // namespace kvcore::lexico::KVCORE_ISA
