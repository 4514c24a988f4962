// Layout of sparse codes and of the store that holds them: the single home of its constants.
//
// The *code* of a vector is `sparsity` pairs of an atom's index and a coefficient, and one scale:
//
//   x  ~  scale * sum_j coefficients[j] * dictionary[indices[j]]
//
// A *tile* holds the codes of 32 consecutive tokens of one kv head, `width` pairs each (zeros where
// a code has fewer):
//
//   [scale fp16 32][index int16 width * 32][coefficient int8 width * 32]
//
// pair j of all tokens side by side, so that a lane takes a token and no lane waits for another.
//
// The newest codes of K and of V are in a *tail* of tiles as wide as the sparsity. 4096 tokens of a
// full tail are sealed into one *block* each, made of what is not zero:
//
//   K: [width uint8 of each tile][tiles, each as wide as its longest code]
//   V: [scale fp16 4096][pairs uint16 of each atom][token uint16 ...][coefficient int8 ...]
//
// V's pairs are in the order of atoms, those of an atom in the order of tokens: the sum that an
// atom takes part in is then a sum of its own, in a fixed order, and no two threads add to one.
#pragma once

#include <cstdint>

namespace kvcore::lexico {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxSparsity = 64;
constexpr int kMaxAtoms = 32768;      // an index is an int16 that is not negative
constexpr int kCoefficientMax = 127;  // largest int8 coefficient
constexpr int kE4M3Max = 448;         // largest E4M3 coefficient

// Matching pursuit stops when no atom is correlated with the residual more than this times the norm
// of the vector: what remains is rounding of fp32.
constexpr double kStopCorrelation = 0x1p-20;
// It also stops when the selected atom is so close to the span of those before it: the squared
// distance of the unit atom from the span. Beyond it the coefficients are rounding.
constexpr double kMinDistanceSquared = 0x1p-16;
// The search takes the norm of an atom for 1: dictionaries further off are rejected.
constexpr double kNormTolerance = 1e-4;

constexpr int kTileTokens = 32;
constexpr int kBlockTiles = 128;
constexpr int kBlockTokens = kBlockTiles * kTileTokens;
constexpr int kBlockAlignment = 64;  // bytes of a block are a multiple of it, for the next one

// Offsets inside a tile.
constexpr int64_t kTileIndices = 2 * kTileTokens;
constexpr int64_t tile_coefficients(int64_t width) {
  return kTileIndices + 2 * kTileTokens * width;
}
constexpr int64_t tile_bytes(int64_t width) {
  return tile_coefficients(width) + kTileTokens * width;
}
/// The width of tiles of so many bytes, 0 if there is none.
constexpr int64_t tile_width(int64_t bytes) {
  const int64_t width = (bytes - kTileIndices) / (3 * kTileTokens);
  return width >= 1 && width <= kMaxSparsity && tile_bytes(width) == bytes ? width : 0;
}

// Offsets inside a sealed block of V with so many pairs.
constexpr int64_t kBlockCounts = 2 * kBlockTokens;
constexpr int kMaxAtomPairs = 0xffff;  // of an atom in a block, whose counts are uint16
constexpr int64_t block_token_ids(int64_t atoms) { return kBlockCounts + 2 * atoms; }
constexpr int64_t block_coefficients(int64_t atoms, int64_t pairs) {
  return block_token_ids(atoms) + 2 * pairs;
}

constexpr int64_t align_block(int64_t bytes) {
  return (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}
constexpr int64_t v_block_bytes(int64_t atoms, int64_t pairs) {
  return align_block(block_coefficients(atoms, pairs) + pairs);
}

}  // namespace kvcore::lexico
