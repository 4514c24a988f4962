// lexico_seal: what the blocks of full tails need, then the blocks. It runs once in 4096 tokens:
// tails are read several times (from L2) rather than sorted once.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/scan.cuh"
#include "lexico/cuda/sealed.cuh"
#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

constexpr int kSealThreads = 256;
constexpr int kSealWarps = kSealThreads / kWarpSize;
// A CTA of V has a thread for each of so many atoms.
constexpr int kSealAtoms = kSealThreads;
// Tokens whose pairs are in shared memory at a time: a tile for each warp.
constexpr int kSealTokens = kSealWarps * kTileTokens;

/// Of one head.
struct HeadSizes {
  int k_bytes, v_pairs;
  int bad_index;  // of V, the largest that names no atom, or -1
};

/// The most pairs that a token of a tile has; by a whole warp.
__device__ __forceinline__ int used_width(const Tile& tile, int lane) {
  int pairs = 0;
  for (int j = 0; j < tile.width; ++j) pairs += tile.coefficient(j, lane) != 0;
  return warp_max(pairs);
}

__device__ __forceinline__ Tile tail_tile(const uint8_t* tail, int64_t head, int t,
                                          int64_t sparsity) {
  return tile_at(tail + (head * kBlockTiles + t) * tile_bytes(sparsity), sparsity);
}

/// grid: a CTA per head.
__global__ void __launch_bounds__(kSealThreads)
    seal_sizes_kernel(const __grid_constant__ SealParams p, HeadSizes* sizes) {
  int* const scratch = reinterpret_cast<int*>(dynamic_smem());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int k_bytes = 0, pairs = 0, bad_index = -1;
  for (int t = static_cast<int>(threadIdx.x) / kWarpSize; t < kBlockTiles; t += kSealWarps) {
    const int width = used_width(tail_tile(p.k_tail, blockIdx.x, t, p.k_sparsity), lane);
    if (lane == 0) k_bytes += static_cast<int>(tile_bytes(width));
    const Tile tile = tail_tile(p.v_tail, blockIdx.x, t, p.v_sparsity);
    for (int j = 0; j < tile.width; ++j) {
      if (tile.coefficient(j, lane) == 0) continue;
      ++pairs;
      const int index = tile.index(j, lane);
      if (index >= p.v_atoms) bad_index = max(bad_index, index);
    }
  }
  const HeadSizes result = {block_sum<kSealThreads>(k_bytes, scratch) + kBlockTiles,
                            block_sum<kSealThreads>(pairs, scratch),
                            block_max<kSealThreads>(bad_index, scratch)};
  if (threadIdx.x == 0) sizes[blockIdx.x] = result;
}

/// grid: a CTA per head, whose warps take its tiles.
__global__ void __launch_bounds__(kSealThreads)
    seal_k_kernel(const __grid_constant__ SealParams p) {
  static_assert(kBlockTiles <= kSealThreads);
  KBlockTiles& smem = *reinterpret_cast<KBlockTiles*>(dynamic_smem());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  for (int t = thread / kWarpSize; t < kBlockTiles; t += kSealWarps) {
    const int width = used_width(tail_tile(p.k_tail, blockIdx.x, t, p.k_sparsity), lane);
    if (lane == 0) smem.widths[t] = width;
  }
  __syncthreads();
  uint8_t* const block = p.k_block + int64_t{blockIdx.x} * p.k_bytes;
  const bool has_tile = thread < kBlockTiles;
  const int width = has_tile ? smem.widths[thread] : 0;
  int total;
  const int offset = block_exclusive_sum<kSealThreads>(
      has_tile ? static_cast<int>(tile_bytes(width)) : 0, smem.scratch, total);
  if (has_tile) {
    smem.offsets[thread] = kBlockTiles + offset;
    block[thread] = static_cast<uint8_t>(width);
  }
  __syncthreads();
  for (int t = thread / kWarpSize; t < kBlockTiles; t += kSealWarps) {
    const Tile tile = tail_tile(p.k_tail, blockIdx.x, t, p.k_sparsity);
    const MutableTile sealed = mutable_tile_at(block + smem.offsets[t], smem.widths[t]);
    sealed.scale[lane] = tile.scale[lane];
    int pair = 0;
    for (int j = 0; j < tile.width; ++j) {
      const int coefficient = tile.coefficient(j, lane);
      if (coefficient != 0) sealed.set(pair++, lane, tile.index(j, lane), coefficient);
    }
  }
}

/// A pair on its way from a tail to the atom's thread.
__device__ __forceinline__ uint32_t pack_pair(int local_atom, int token, int coefficient) {
  static_assert(kSealAtoms <= 1 << 8 && kBlockTokens <= 1 << 12);
  return static_cast<uint32_t>(local_atom) << 20 | static_cast<uint32_t>(token) << 8 |
         static_cast<uint8_t>(coefficient);
}

struct SealVSmem {
  int counts[kSealAtoms];
  int scratch[kSealWarps];
  uint32_t pairs[];  // [kSealTokens * v_sparsity]

  static size_t bytes(int64_t v_sparsity) {
    return sizeof(SealVSmem) + sizeof(uint32_t) * kSealTokens * v_sparsity;
  }
};
static_assert(sizeof(SealVSmem) + sizeof(uint32_t) * kSealTokens * kMaxSparsity <=
              kPortableSmemBytes);

/// grid: kSealAtoms atoms of a head for each CTA. It counts all pairs first, since those of earlier
/// atoms say where its own go. Then the pairs of its atoms come into shared memory in the order of
/// tokens, some tiles at a time, and the thread of an atom takes them from there: a stable sort.
__global__ void __launch_bounds__(kSealThreads)
    seal_v_kernel(const __grid_constant__ SealParams p, int ranges, uint32_t* error_flags) {
  SealVSmem& smem = *reinterpret_cast<SealVSmem*>(dynamic_smem());
  const int64_t head = blockIdx.x / ranges;
  const int first_atom = static_cast<int>(blockIdx.x % ranges) * kSealAtoms;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  uint8_t* const block = p.v_block + head * p.v_bytes;

  smem.counts[thread] = 0;
  __syncthreads();
  int before = 0, all = 0;
  for (int t = warp; t < kBlockTiles; t += kSealWarps) {
    const Tile tile = tail_tile(p.v_tail, head, t, p.v_sparsity);
    for (int j = 0; j < tile.width; ++j) {
      if (tile.coefficient(j, lane) == 0) continue;
      const int local = tile.index(j, lane) - first_atom;
      ++all;
      before += local < 0;
      if (local >= 0 && local < kSealAtoms) atomicAdd(&smem.counts[local], 1);
    }
  }
  before = block_sum<kSealThreads>(before, smem.scratch);
  all = block_sum<kSealThreads>(all, smem.scratch);
  int total;
  const int count = smem.counts[thread];
  int next = before + block_exclusive_sum<kSealThreads>(count, smem.scratch, total);
  // Only codes that name an atom more than once have so many of it.
  if (count > kMaxAtomPairs) report_error(error_flags, kErrorCodes);
  if (first_atom + thread < p.v_atoms) {
    reinterpret_cast<uint16_t*>(block + kBlockCounts)[first_atom + thread] =
        static_cast<uint16_t>(count);
  }
  uint16_t* const tokens = reinterpret_cast<uint16_t*>(block + block_token_ids(p.v_atoms));
  int8_t* const coefficients =
      reinterpret_cast<int8_t*>(block + block_coefficients(p.v_atoms, all));

  for (int first_tile = 0; first_tile < kBlockTiles; first_tile += kSealWarps) {
    const Tile tile = tail_tile(p.v_tail, head, first_tile + warp, p.v_sparsity);
    const int token = first_tile * kTileTokens + thread;
    if (first_atom == 0) {
      reinterpret_cast<uint16_t*>(block)[token] = tile.scale[lane];
    }
    const auto each_pair = [&](const auto& f) {
      for (int j = 0; j < tile.width; ++j) {
        const int local = tile.index(j, lane) - first_atom, coefficient = tile.coefficient(j, lane);
        if (coefficient != 0 && local >= 0 && local < kSealAtoms) f(local, coefficient);
      }
    };
    int pairs = 0;
    each_pair([&](int, int) { ++pairs; });
    // Threads are in the order of tokens. Behind the barriers in it the list is free again.
    int at = block_exclusive_sum<kSealThreads>(pairs, smem.scratch, total);
    each_pair([&](int local, int coefficient) {
      smem.pairs[at++] = pack_pair(local, token, coefficient);
    });
    __syncthreads();
    for (int i = 0; i < total; ++i) {
      const uint32_t pair = smem.pairs[i];
      if (static_cast<int>(pair >> 20) != thread) continue;
      tokens[next] = static_cast<uint16_t>(pair >> 8 & (kBlockTokens - 1));
      coefficients[next] = static_cast<int8_t>(pair & 0xff);
      ++next;
    }
  }
}

}  // namespace kvcore::lexico
