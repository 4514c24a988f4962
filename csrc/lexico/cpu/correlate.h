// Products of vectors and atoms in 16-bit integers, a tile at a time. For code that is compiled per
// ISA level.
//
// A vector is stored as rint(kUnit x / ||x||), an atom as rint(kUnit d): twice the products an
// instruction of fp32, and sums are exact. What the rounding of both costs has a bound, and what
// lies within it of the largest product is multiplied again in fp32, which decides.
#pragma once

#include <cmath>

#include "core/cpu/words.h"
#include "lexico/cpu/encode_kernels.h"
#include "lexico/cpu/exact.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

// The largest number for which neither a channel of an atom whose norm is 1.0001 leaves int16, nor
// the product of two such atoms over 2^15, rounded as they are.
constexpr float kUnit = 32750;

/// The most that a product of an atom and a residual is off in fp32, relative to the norms of what
/// makes up the residual: a sum has at most 64 products in a lane, which level scalar rounds
/// twice, and `count` atoms were subtracted.
inline float float_error(int count) { return 0x1p-24f * static_cast<float>(2 * count + 136); }

/// The most that a product of such a vector and such an atom, in units of kUnit^2, is off because
/// one of them is rounded.
inline float rounding_of_channels(int head_dim) {
  // A channel is off by 1/2, so the factor by half the root of head_dim, and the other one's norm
  // is kUnit; 1.001 covers the product of the two errors.
  return 0.5f * 1.001f / kUnit * __builtin_sqrtf(static_cast<float>(head_dim));
}

/// words [head_dim] = rint(row * scale), which fit.
inline void quantize_row(const float* row, int head_dim, float scale, int16_t* words) {
  for (int i = 0; i < head_dim; i += kLanes) {
    store_words(words + i, to_i32(load(row + i) * splat(scale)));
  }
}

// kRowTile * kChunks sums, kChunks atoms' values and one pair of a vector are in registers.
constexpr int kChunks = kVectorRegisters == 32 ? 4 : 2;
constexpr int kTileAtoms = kChunks * kLanes;
static_assert(kPanelAtoms % kTileAtoms == 0);

/// acc[row][chunk]: products of kRows rows and the kTileAtoms atoms that begin at `panel`,
/// [num_pairs, kPanelAtoms, 2]. Pair i of row r lies at rows[r * row_stride + i * pair_stride].
template <int kRows>
[[gnu::flatten]] inline void correlate_tile(const int16_t* rows, int row_stride, int pair_stride,
                                            const int16_t* panel, int num_pairs,
                                            I32 (&acc)[kRows][kChunks]) {
  I32 sums[kRows][kChunks];
  unroll<kRows>([&](int row) { unroll<kChunks>([&](int c) { sums[row][c] = splat_i32(0); }); });
  for (int i = 0; i < num_pairs; ++i) {
    Bytes atoms[kChunks];
    unroll<kChunks>(
        [&](int c) { atoms[c] = load_bytes(panel + (i * kPanelAtoms + c * kLanes) * 2); });
    unroll<kRows>([&](int row) {
      const Bytes pair = splat_dword(rows + row * row_stride + i * pair_stride);
      unroll<kChunks>([&](int c) { sums[row][c] = dot_words(sums[row][c], pair, atoms[c]); });
    });
  }
  unroll<kRows>([&](int row) { unroll<kChunks>([&](int c) { acc[row][c] = sums[row][c]; }); });
}

}  // namespace kvcore::lexico::KVCORE_ISA
