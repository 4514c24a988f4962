// Tiles and sealed blocks as pointers into their bytes. Included by code of every ISA level, so
// functions are always inlined: a copy of their own would be one for all levels.
#pragma once

#include "lexico/params.h"

namespace kvcore::lexico {

struct Tile {
  int64_t width;
  const uint16_t* scale;       // [kTileTokens] fp16
  const int16_t* indices;      // [width, kTileTokens]
  const int8_t* coefficients;  // [width, kTileTokens]
};
[[gnu::always_inline]] inline Tile tile_at(const uint8_t* data, int64_t width) {
  return {width, reinterpret_cast<const uint16_t*>(data),
          reinterpret_cast<const int16_t*>(data + kTileIndices),
          reinterpret_cast<const int8_t*>(data + tile_coefficients(width))};
}

struct MutableTile {
  uint16_t* scale;
  int16_t* indices;
  int8_t* coefficients;
};
[[gnu::always_inline]] inline MutableTile mutable_tile_at(uint8_t* data, int64_t width) {
  return {reinterpret_cast<uint16_t*>(data), reinterpret_cast<int16_t*>(data + kTileIndices),
          reinterpret_cast<int8_t*>(data + tile_coefficients(width))};
}

/// A sealed block of K, of one head.
struct KBlock {
  const uint8_t* widths;  // [kBlockTiles]
  const uint8_t* tiles;   // one after the other
};
/// False if its tiles do not fit the block.
[[gnu::always_inline]] inline bool open_k_block(const uint8_t* data, int64_t bytes, KBlock* block) {
  *block = {data, data + kBlockTiles};
  int64_t needed = kBlockTiles;
  bool valid = true;
  for (int t = 0; t < kBlockTiles; ++t) {
    valid = valid && data[t] <= kMaxSparsity;
    needed += tile_bytes(data[t]);
  }
  return valid && needed <= bytes;
}

/// A sealed block of V, of one head.
struct VBlock {
  const uint16_t* scale;       // [kBlockTokens] fp16
  const uint16_t* counts;      // [atoms] pairs of each
  const uint16_t* tokens;      // [pairs]
  const int8_t* coefficients;  // [pairs]
  int64_t pairs;
};
/// False if its pairs do not fit the block. Whether tokens are below kBlockTokens is not checked.
[[gnu::always_inline]] inline bool open_v_block(const uint8_t* data, int64_t bytes, int64_t atoms,
                                                VBlock* block) {
  block->scale = reinterpret_cast<const uint16_t*>(data);
  block->counts = reinterpret_cast<const uint16_t*>(data + kBlockCounts);
  block->tokens = reinterpret_cast<const uint16_t*>(data + block_token_ids(atoms));
  int64_t pairs = 0;
  for (int64_t n = 0; n < atoms; ++n) pairs += block->counts[n];
  block->coefficients = reinterpret_cast<const int8_t*>(data + block_coefficients(atoms, pairs));
  block->pairs = pairs;
  return block_coefficients(atoms, pairs) + pairs <= bytes;
}

}  // namespace kvcore::lexico
