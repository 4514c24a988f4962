// The pass over K: scores of a unit's rows with the tokens of one chunk, and their maxima.
//
// grid: one CTA for each (chunk of a block or of the tail, segment of the buffer; unit), units
// fastest, so that those that read the same codes run together. The unit's table comes into shared
// memory, in pieces if it is too large; a warp takes a tile, a lane a token of it: what a warp
// reads of the codes is contiguous, no lane waits for another, and an entry of the table serves all
// rows of the unit.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/copy.cuh"
#include "core/cuda/error_flags.cuh"
#include "core/cuda/online_softmax.cuh"
#include "core/cuda/reduce.cuh"
#include "lexico/cuda/attention_args.cuh"
#include "lexico/cuda/sealed.cuh"

namespace kvcore::lexico {

template <int kRows>
struct ScoresSmem {
  static constexpr int kTableAtoms = kTableBytes / (sizeof(float) * kRows);

  union {
    RowFloats<kRows> table[kTableAtoms];
    float queries[kRows * kMaxHeadDim];  // [kRows, head_dim], for the buffer
  };
  KBlockTiles tiles;
  RowsOfPart<kRows> rows;
  float factors[kRows];
  float max[kScoreWarps][kRows];
};

/// The chunk of a CTA.
struct ScoreChunk {
  Part part;
  int64_t idx;     // in chunk_max
  int64_t block;   // -1 in the tail, -2 in the buffer
  int first_tile;  // in the block or the tail
};

__device__ inline ScoreChunk score_chunk(const AttentionArgs& args, const LaunchBlocks& blocks,
                                         const Unit& unit, int64_t num) {
  const AttentionPlan& plan = args.plan;
  const int64_t of_blocks = blocks.count * plan.block_chunks;
  const int64_t tokens = plan.chunk_tiles * kTileTokens;
  if (num < of_blocks) {
    const int64_t block = blocks.first + num / plan.block_chunks;
    const int64_t first = num % plan.block_chunks * tokens, slot = block * kBlockTokens + first;
    return {{slot, slot, static_cast<int>(tokens)},
            blocks.first * plan.block_chunks + num,
            block,
            static_cast<int>(first / kTileTokens)};
  }
  num -= of_blocks;
  const int64_t idx = args.p.num_blocks * plan.block_chunks + num;
  if (num < plan.tail_chunks) {
    return {tail_part(args, unit, num * tokens, tokens), idx, -1,
            static_cast<int>(num * plan.chunk_tiles)};
  }
  return {buffer_part(args, unit, num - plan.tail_chunks), idx, -2, 0};
}

/// A lane's scores of a token go to memory, and into the maxima of those rows that see it.
template <int kRows>
__device__ __forceinline__ void keep_scores(const RowFloats<kRows>& scores, int token,
                                            const RowsOfPart<kRows>& rows, float* out,
                                            float (&top)[kRows]) {
  *reinterpret_cast<RowFloats<kRows>*>(out + token * kRows) = scores;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // fmaxf leaves NaN out.
    if (rows.sees(r, token)) top[r] = fmaxf(top[r], scores.x[r]);
  }
}

template <int kRows>
__device__ inline void score_codes(const AttentionArgs& args, const LaunchBlocks& blocks,
                                   const Unit& unit, const ScoreChunk& chunk,
                                   ScoresSmem<kRows>& smem, float* out, float (&top)[kRows]) {
  using Smem = ScoresSmem<kRows>;
  const AttentionParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int begin = chunk.part.seen_begin(unit), end = chunk.part.seen_end(unit);
  const uint8_t* data;
  bool valid = true;
  if (chunk.block >= 0) {
    const Block& block = blocks.block[chunk.block - blocks.first];
    data = block.data + unit.head_idx(args) * block.bytes;
    valid = open_k_block<kScoreThreads>(data, block.bytes, kMaxSparsity, smem.tiles);
  } else {
    data = p.k_tail + unit.head_idx(args) * p.k_tiles * tile_bytes(p.k_sparsity);
  }
  if (!valid) {
    // Nothing of the block can be trusted: whoever sees a token of it gets NaN.
    if (threadIdx.x == 0) report_error(args.error_flags, kErrorCodes);
    RowFloats<kRows> nan;
#pragma unroll
    for (int r = 0; r < kRows; ++r) nan.x[r] = quiet_nan();
    for (int token = static_cast<int>(threadIdx.x); token < chunk.part.tokens;
         token += kScoreThreads) {
      keep_scores(nan, token, smem.rows, out, top);
    }
    return;
  }

  const auto* const table =
      reinterpret_cast<const RowFloats<kRows>*>(args.tables) + unit.idx * p.k_atoms;
  for (int64_t first_atom = 0; first_atom < p.k_atoms; first_atom += Smem::kTableAtoms) {
    const int atoms = static_cast<int>(min(int64_t{Smem::kTableAtoms}, p.k_atoms - first_atom));
    const bool is_first = first_atom == 0, is_last = first_atom + atoms == p.k_atoms;
    const bool is_whole = is_first && is_last;
    __syncthreads();
    static_assert(sizeof(RowFloats<kRows>) == 16);
    for (int i = static_cast<int>(threadIdx.x); i < atoms; i += kScoreThreads) {
      cp_async_16(&smem.table[i], &table[first_atom + i]);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int t = begin / kTileTokens + warp; t * kTileTokens < end; t += kScoreWarps) {
      const int token = t * kTileTokens + lane;
      // What lies past the tail's tokens means nothing.
      if (token < begin || token >= end) continue;
      const int tile_idx = chunk.first_tile + t;
      const Tile tile =
          chunk.block >= 0
              ? tile_at(data + smem.tiles.offsets[tile_idx], smem.tiles.widths[tile_idx])
              : tile_at(data + tile_idx * tile_bytes(p.k_sparsity), p.k_sparsity);
      RowFloats<kRows> sum = {};
      if (!is_first) sum = *reinterpret_cast<const RowFloats<kRows>*>(out + token * kRows);
      int largest = 0;
#pragma unroll 4
      for (int j = 0; j < tile.width; ++j) {
        const int index = tile.index(j, lane);
        largest = max(largest, index);
        float coefficient = static_cast<float>(tile.coefficient(j, lane));
        int local = index;
        if (!is_whole) {
          local = index - static_cast<int>(first_atom);
          if (local < 0 || local >= atoms) coefficient = 0.0f;
          local = max(local, 0);
        }
        const RowFloats<kRows> entry = smem.table[min(local, atoms - 1)];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sum.x[r] = __fmaf_rn(coefficient, entry.x[r], sum.x[r]);
        }
      }
      if (!is_last) {
        *reinterpret_cast<RowFloats<kRows>*>(out + token * kRows) = sum;
        continue;
      }
      float scale = to_float(Half{tile.scale[lane]});
      if (largest >= p.k_atoms) {
        report_error(args.error_flags, kErrorCodes);
        scale = quiet_nan();
      }
      if (!is_finite(scale)) scale = quiet_nan();
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum.x[r] *= smem.factors[r] * scale;
      keep_scores(sum, token, smem.rows, out, top);
    }
  }
}

/// A warp takes a token, its lanes the channels.
template <int kRows>
__device__ inline void score_buffer(const AttentionArgs& args, const Unit& unit,
                                    const ScoreChunk& chunk, ScoresSmem<kRows>& smem, float* out,
                                    float (&top)[kRows]) {
  const AttentionParams& p = args.p;
  const int head_dim = static_cast<int>(p.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * head_dim; i += kScoreThreads) {
    smem.queries[i] = args.queries[unit.idx * kRows * head_dim + i];
  }
  __syncthreads();
  const int64_t first = chunk.part.first_slot - p.num_blocks * kBlockTokens - args.plan.tail_slots;
  const int64_t base =
      unit.batch_idx * p.k_buffer.batch_stride + unit.kv_head * p.k_buffer.head_stride;
  const int end = chunk.part.seen_end(unit);
  for (int token = chunk.part.seen_begin(unit) + warp; token < end; token += kScoreWarps) {
    const int64_t at = base + (first + token) * p.k_buffer.token_stride;
    RowFloats<kRows> sum = {};
    float poison = 0.0f;
#pragma unroll 2
    for (int c = lane; c < head_dim; c += kWarpSize) {
      const float key = load_element(p.k_buffer, at + c * p.k_buffer.channel_stride);
      poison += key * 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum.x[r] = __fmaf_rn(key, smem.queries[r * head_dim + c], sum.x[r]);
      }
    }
    poison = warp_sum(poison);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum.x[r] = warp_sum(sum.x[r]) + poison + smem.factors[r] * 0.0f;
    }
    if (lane == 0) keep_scores(sum, token, smem.rows, out, top);
  }
}

template <int kRows>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtas)
    scores_kernel(const __grid_constant__ AttentionArgs args,
                  const __grid_constant__ LaunchBlocks blocks) {
  using Smem = ScoresSmem<kRows>;
  static_assert(sizeof(Smem) <= kPortableSmemBytes);
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int thread = static_cast<int>(threadIdx.x);
  const Unit unit = make_unit(args, blockIdx.x % args.num_units);
  if (unit.error != 0) return;
  const ScoreChunk chunk = score_chunk(args, blocks, unit, blockIdx.x / args.num_units);
  float* const chunk_max = args.chunk_max + (unit.idx * args.plan.num_chunks + chunk.idx) * kRows;
  if (!chunk.part.is_seen(unit)) {
    if (thread < kRows) chunk_max[thread] = negative_infinity();
    return;
  }
  if (thread < kRows) {
    smem.rows.set(args, unit, chunk.part, thread);
    smem.factors[thread] = args.factors[unit.idx * kRows + thread];
  }
  __syncthreads();
  float* const out = args.scores + (unit.idx * args.plan.num_slots + chunk.part.first_slot) * kRows;
  float top[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) top[r] = negative_infinity();
  if (chunk.block == -2) {
    score_buffer(args, unit, chunk, smem, out, top);
  } else {
    score_codes(args, blocks, unit, chunk, smem, out, top);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = warp_max(top[r]);
    if (thread % kWarpSize == 0) smem.max[thread / kWarpSize][r] = top[r];
  }
  __syncthreads();
  if (thread < kRows) {
    float result = smem.max[0][thread];
    for (int w = 1; w < kScoreWarps; ++w) result = fmaxf(result, smem.max[w][thread]);
    chunk_max[thread] = result;
  }
}

}  // namespace kvcore::lexico
