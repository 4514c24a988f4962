// lexico_unseal: a CTA per head of K, and one per 256 tokens of a head of V. A block that is not
// one of lexico_seal's is reported; what cannot be read of it becomes codes whose scale is NaN.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/scan.cuh"
#include "lexico/cuda/coefficients.cuh"
#include "lexico/cuda/sealed.cuh"
#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

constexpr int kUnsealThreads = 256;
constexpr int kUnsealWarps = kUnsealThreads / kWarpSize;
// For sm_120 nvcc would aim at full occupancy, and spill for it.
constexpr int kUnsealCtas = 4;

__global__ void __launch_bounds__(kUnsealThreads, kUnsealCtas)
    unseal_k_kernel(const __grid_constant__ UnsealParams p, uint32_t* error_flags) {
  KBlockTiles& tiles = *reinterpret_cast<KBlockTiles*>(dynamic_smem());
  const int64_t head = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint8_t* block = p.k_block + head * p.k_bytes;
  const bool valid = open_k_block<kUnsealThreads>(block, p.k_bytes, p.k_sparsity, tiles);
  if (!valid && threadIdx.x == 0) report_error(error_flags, kErrorCodes);
  for (int t = static_cast<int>(threadIdx.x) / kWarpSize; t < kBlockTiles; t += kUnsealWarps) {
    const MutableTile tile = mutable_tile_at(
        p.k_tail + (head * kBlockTiles + t) * tile_bytes(p.k_sparsity), p.k_sparsity);
    if (!valid) {
      tile.scale[lane] = kNaN16;
      continue;
    }
    const Tile sealed = tile_at(block + tiles.offsets[t], tiles.widths[t]);
    tile.scale[lane] = sealed.scale[lane];
    for (int j = 0; j < sealed.width; ++j) {
      tile.set(j, lane, sealed.index(j, lane), sealed.coefficient(j, lane));
    }
  }
}

struct UnsealVSmem {
  int offsets[kUnsealThreads];     // pairs of each atom, from the first of those at hand on
  uint32_t pairs[kUnsealThreads];  // atom, token and coefficient, 8 bits each
  int64_t wide_scratch[kUnsealWarps];
  int scratch[kUnsealWarps];
};

/// The last of `count` ascending offsets that is not above x; the first is.
__device__ __forceinline__ int find_offset(const int* offsets, int count, int x) {
  int first = 0;
  while (count > 1) {
    const int half = count / 2;
    if (offsets[first + half] <= x) first += half;
    count -= half;
  }
  return first;
}

/// A token's pairs are in the order of atoms, as they are in the block: a thread per token takes
/// its own out of those that the CTA's tokens have among the next 256.
__global__ void __launch_bounds__(kUnsealThreads, kUnsealCtas)
    unseal_v_kernel(const __grid_constant__ UnsealParams p, uint32_t* error_flags) {
  UnsealVSmem& smem = *reinterpret_cast<UnsealVSmem*>(dynamic_smem());
  constexpr int kRanges = kBlockTokens / kUnsealThreads;
  const int64_t head = blockIdx.x / kRanges;
  const int first_token = static_cast<int>(blockIdx.x % kRanges) * kUnsealThreads;
  const int thread = static_cast<int>(threadIdx.x), own = first_token + thread;
  const int lane = own % kTileTokens;
  const MutableTile tile = mutable_tile_at(
      p.v_tail + (head * kBlockTiles + own / kTileTokens) * tile_bytes(p.v_sparsity), p.v_sparsity);
  const VBlock block(p.v_block + head * p.v_bytes, p.v_atoms);

  const int64_t all = block.count_pairs<kUnsealThreads>(0, p.v_atoms, smem.wide_scratch);
  bool valid = block.fits(all, p.v_bytes);
  int used = 0;
  int64_t begin = 0;
  for (int64_t atom = 0; valid && atom < p.v_atoms; atom += kUnsealThreads) {
    const int count = atom + thread < p.v_atoms ? block.counts[atom + thread] : 0;
    int total;
    smem.offsets[thread] = block_exclusive_sum<kUnsealThreads>(count, smem.scratch, total);
    for (int first = 0; first < total; first += kUnsealThreads) {
      const int pair = first + thread;
      const int token = pair < total ? block.tokens[begin + pair] : kBlockTokens;
      valid = valid && (pair >= total || token < kBlockTokens);
      const int local = token - first_token;
      const bool is_own = local >= 0 && local < kUnsealThreads;
      int taken;
      const int at = block_exclusive_sum<kUnsealThreads>(is_own, smem.scratch, taken);
      if (is_own) {
        const int n = find_offset(smem.offsets, kUnsealThreads, pair);
        const uint8_t coefficient = block.coefficients(all)[begin + pair];
        smem.pairs[at] =
            static_cast<uint32_t>(n) << 16 | static_cast<uint32_t>(local) << 8 | coefficient;
      }
      __syncthreads();
      for (int i = 0; i < taken; ++i) {
        const uint32_t found = smem.pairs[i];
        if (static_cast<int>(found >> 8 & 0xff) != thread) continue;
        if (used < p.v_sparsity) {
          tile.set(used, lane, static_cast<int>(atom + (found >> 16)),
                   static_cast<int8_t>(found & 0xff));
        }
        ++used;
      }
    }
    begin += total;
    // Before the offsets are written again.
    valid = __syncthreads_or(!valid) == 0;
  }
  const bool is_bad = !valid || used > p.v_sparsity;
  tile.scale[lane] = is_bad ? kNaN16 : block.scale[own];
  if (is_bad) report_error(error_flags, kErrorCodes);
}

}  // namespace kvcore::lexico
