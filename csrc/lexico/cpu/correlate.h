// Products of vectors and atoms, a tile at a time. For code that is compiled per ISA level.
#pragma once

#include "core/cpu/vec.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

// kRowTile * kChunks sums, kChunks atoms' values and one channel of a vector are in registers.
constexpr int kChunks = kVectorRegisters == 32 ? 4 : 2;
constexpr int kTileAtoms = kChunks * kLanes;
static_assert(kPanelAtoms % kTileAtoms == 0);

/// acc[row][chunk]: products of kRowTile rows [kRowTile, head_dim] and the kTileAtoms atoms that
/// begin at `panel`, [head_dim, kPanelAtoms].
[[gnu::flatten]] inline void correlate_tile(const float* rows, const float* panel, int head_dim,
                                            F32 (&acc)[kRowTile][kChunks]) {
  F32 sums[kRowTile][kChunks];
  unroll<kRowTile>([&](int row) { unroll<kChunks>([&](int c) { sums[row][c] = splat(0.0f); }); });
  for (int i = 0; i < head_dim; ++i) {
    F32 atoms[kChunks];
    unroll<kChunks>([&](int c) { atoms[c] = load(panel + i * kPanelAtoms + c * kLanes); });
    unroll<kRowTile>([&](int row) {
      const F32 x = splat(rows[row * head_dim + i]);
      unroll<kChunks>([&](int c) { sums[row][c] = fma(x, atoms[c], sums[row][c]); });
    });
  }
  unroll<kRowTile>([&](int row) { unroll<kChunks>([&](int c) { acc[row][c] = sums[row][c]; }); });
}

/// The largest magnitude seen in each lane, and where; the first of equal ones.
struct LaneBest {
  F32 value, index;  // indices as floats: exact below 2^24

  static LaneBest none() { return {splat(0.0f), splat(0.0f)}; }
  void update(F32 x, F32 x_index) {
    const F32 magnitude = abs(x);
    const Mask larger = less(value, magnitude);
    value = select(larger, magnitude, value);
    index = select(larger, x_index, index);
  }
};

/// The largest of all lanes; the lowest index of equal ones.
struct Best {
  float value;
  int32_t index;
};
inline Best reduce(const LaneBest& lanes) {
  float values[kLanes], indices[kLanes];
  store(values, lanes.value);
  store(indices, lanes.index);
  int best = 0;
  for (int i = 1; i < kLanes; ++i) {
    const bool first = values[i] == values[best] && indices[i] < indices[best];
    if (values[i] > values[best] || first) best = i;
  }
  return {values[best], static_cast<int32_t>(indices[best])};
}

#if defined(KVCORE_ISA_AVX512_BF16)

/// The two largest magnitudes seen in each lane, and where; the first of equal ones.
struct LaneBestTwo {
  F32 value[2], index[2];

  static LaneBestTwo none() { return {{splat(0.0f), splat(0.0f)}, {splat(0.0f), splat(0.0f)}}; }
  void update(F32 x, F32 x_index) {
    const F32 magnitude = abs(x);
    const Mask first = less(value[0], magnitude), second = less(value[1], magnitude);
    value[1] = select(first, value[0], select(second, magnitude, value[1]));
    index[1] = select(first, index[0], select(second, x_index, index[1]));
    value[0] = select(first, magnitude, value[0]);
    index[0] = select(first, x_index, index[0]);
  }
};

/// A row [head_dim] rounded to pairs of bf16 [head_dim / 2], the earlier channel in the low half.
inline void round_row(const float* row, int head_dim, uint32_t* pairs) {
  for (int i = 0; i < head_dim; i += 2 * kLanes) {
    const __m512bh both = _mm512_cvtne2ps_pbh(load(row + i + kLanes), load(row + i));
    _mm512_storeu_si512(pairs + i / 2, (__m512i)both);
  }
}

/// correlate_tile of rows [kRowTile, head_dim / 2] and a panel [head_dim / 2, kPanelAtoms] of
/// pairs.
[[gnu::flatten]] inline void correlate_pairs(const uint32_t* rows, const uint32_t* panel,
                                             int head_dim, F32 (&acc)[kRowTile][kChunks]) {
  F32 sums[kRowTile][kChunks];
  unroll<kRowTile>([&](int row) { unroll<kChunks>([&](int c) { sums[row][c] = splat(0.0f); }); });
  const int num_pairs = head_dim / 2;
  for (int i = 0; i < num_pairs; ++i) {
    __m512bh atoms[kChunks];
    unroll<kChunks>([&](int c) {
      atoms[c] = (__m512bh)_mm512_loadu_si512(panel + i * kPanelAtoms + c * kLanes);
    });
    unroll<kRowTile>([&](int row) {
      const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[row * num_pairs + i]));
      unroll<kChunks>([&](int c) { sums[row][c] = _mm512_dpbf16_ps(sums[row][c], x, atoms[c]); });
    });
  }
  unroll<kRowTile>([&](int row) { unroll<kChunks>([&](int c) { acc[row][c] = sums[row][c]; }); });
}

#endif

}  // namespace kvcore::lexico::KVCORE_ISA
