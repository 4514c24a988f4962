// Sealed blocks as kernels read them: checked before anything is read through what they say.
#pragma once

#include "core/cuda/reduce.cuh"
#include "core/cuda/scan.cuh"
#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

/// Where the tiles of a block of K are; in shared memory.
struct KBlockTiles {
  int widths[kBlockTiles];
  int offsets[kBlockTiles];  // from the block's first byte
  int scratch[32];
};

/// Fills it, by a whole CTA, behind a barrier; false if a tile is wider than max_width or does not
/// lie in the block, and then nothing else may be used.
template <int kThreads>
__device__ inline bool open_k_block(const uint8_t* block, int64_t bytes, int64_t max_width,
                                    KBlockTiles& tiles) {
  static_assert(kThreads >= kBlockTiles);
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_tile = thread < kBlockTiles;
  const int width = has_tile ? block[thread] : 0;
  int total;
  const int offset = block_exclusive_sum<kThreads>(
      has_tile ? static_cast<int>(tile_bytes(width)) : 0, tiles.scratch, total);
  if (has_tile) {
    tiles.widths[thread] = width;
    tiles.offsets[thread] = kBlockTiles + offset;
  }
  return __syncthreads_or(width > max_width) == 0 && kBlockTiles + total <= bytes;
}

/// A block of V of one head.
struct VBlock {
  const uint8_t* data;
  const uint16_t* scale;   // [kBlockTokens] fp16
  const uint16_t* counts;  // [atoms] pairs of each
  const uint16_t* tokens;  // [pairs]
  int64_t atoms;

  __device__ VBlock(const uint8_t* block, int64_t atoms)
      : data(block),
        scale(reinterpret_cast<const uint16_t*>(block)),
        counts(reinterpret_cast<const uint16_t*>(block + kBlockCounts)),
        tokens(reinterpret_cast<const uint16_t*>(block + block_token_ids(atoms))),
        atoms(atoms) {}

  /// [pairs]
  __device__ const int8_t* coefficients(int64_t pairs) const {
    return reinterpret_cast<const int8_t*>(data + block_coefficients(atoms, pairs));
  }

  /// Pairs of atoms [begin, end), by a whole CTA.
  template <int kThreads>
  __device__ int64_t count_pairs(int64_t begin, int64_t end, int64_t* scratch) const {
    int64_t sum = 0;
    for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) sum += counts[n];
    return block_sum<kThreads>(sum, scratch);
  }

  /// Whether so many pairs lie in the block, and 4096 codes may have as many.
  __device__ bool fits(int64_t pairs, int64_t bytes) const {
    return pairs <= kBlockTokens * kMaxSparsity &&
           block_coefficients(atoms, pairs) + pairs <= bytes;
  }
};

}  // namespace kvcore::lexico
