// How lexico_attention is cut into CTAs, and why. Nothing here was measured on a GPU: the figures
// are counts (README, "CUDA"). What the device or the batch has a say in changes no sum: partial
// results are those of fixed parts of the context, whichever CTA computes them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cuda/grid.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// Query rows of a unit: they share a gathered entry of a table, and so one access to shared memory,
// which is what both passes wait for. In fp32 that is 16 bytes, the most that a lane can load.
//
// K's table is fp32 whatever the queries' type: in fp16 a score of 16 would be off by 4e-3, and
// with it its weight. The weights of V's tokens, whose errors are relative, are fp16 for queries of
// 16 bits, which takes 6.2 cycles for a warp's access instead of 10.4.
constexpr int kUnitRows = 4;

// The score pass: 8 warps, three CTAs to a multiprocessor by registers (80 a thread; with 64 nvcc
// spills for sm_120) and by shared memory (66 KiB) on sm_90, two on sm_80, one on sm_120. 24 warps
// hide the latency of shared memory and of L2.
constexpr int kScoreThreads = 256;
constexpr int kScoreCtas = 3;
constexpr int kScoreWarps = kScoreThreads / 32;
// The value pass has the pairs of several atoms on their way in registers, and would spill with 64
// of them: 8 warps, and registers for two or three CTAs.
constexpr int kValueThreads = 256;
constexpr int kValueCtas = 2;
constexpr int kValueWarps = kValueThreads / 32;

// Bytes of a table in shared memory. Larger ones come in pieces, and codes are read once for each.
constexpr int kTableBytes = 64 * 1024;

// Atoms with more pairs in a block than that are summed by a warp, the others by eight lanes. A
// block has 16 pairs an atom at sparsity 16 and 4096 atoms; a few atoms take part in most codes.
constexpr int kHeavyPairs = 128;
constexpr int kPairLanes = 8;
// Atoms whose first 2 * kPairLanes pairs eight lanes have on their way at a time.
constexpr int kPairBatch = 4;

// Tokens of the tail whose weights are summed together: four parts for 132 multiprocessors.
constexpr int64_t kTailSegment = 1024;
static_assert(kTailSegment % kTileTokens == 0 && kTailSegment <= kBlockTokens);
// Buffered tokens that one CTA attends: more than a buffer usually has.
constexpr int64_t kBufferSegment = 256;

// Tiles of the two matrix products: 64 atoms by 32 rows of any units. One layer of a model with 32
// query heads is one tile of rows, and 4096 atoms are 64 CTAs, each for some 2 us.
constexpr int kProductAtoms = 64;
constexpr int kProductRows = 32;

// Scratch memory of the units in work at a time; decoding of common batches is one wave.
constexpr int64_t kWaveBytes = int64_t{256} << 20;

// Blocks whose addresses travel with one launch, as its argument: nothing is copied to the device
// first, and a captured graph keeps them.
constexpr int kLaunchBlocks = 128;

/// Parts of the context that have partial results of their own.
struct Segments {
  int64_t blocks, tail, buffer;

  constexpr int64_t coded() const { return blocks + tail; }
  constexpr int64_t all() const { return blocks + tail + buffer; }
};

struct AttentionPlan {
  int64_t group, num_rows;  // of a kv head
  int64_t tiles;            // units of a kv head
  int64_t num_units;
  int64_t tail_slots;  // tokens that both tails have room for
  int64_t num_slots;   // tokens that have a place for scores
  Segments segments;
  int64_t chunk_tiles;                            // of a CTA of the score pass
  int64_t block_chunks, tail_chunks, num_chunks;  // of one block, of the tail, at all
  int64_t block_parts, tail_parts;                // of the atoms of V
  int64_t block_part_atoms, tail_part_atoms;
  int64_t atom_chunks;  // of the product with V's atoms
};

inline AttentionPlan attention_plan(const AttentionParams& p, int sm_count) {
  AttentionPlan plan = {};
  plan.group = p.q_heads / p.kv_heads;
  plan.num_rows = plan.group * p.q_len;
  plan.tiles = ceil_div(plan.num_rows, kUnitRows);
  plan.num_units = p.batch * p.kv_heads * plan.tiles;
  plan.tail_slots = std::min<int64_t>({p.k_tiles, p.v_tiles, kBlockTiles}) * kTileTokens;
  plan.num_slots = p.num_blocks * kBlockTokens + plan.tail_slots + p.buffer_len;
  plan.segments = {p.num_blocks, ceil_div(plan.tail_slots, kTailSegment),
                   ceil_div(p.buffer_len, kBufferSegment)};

  // Each CTA of the score pass loads the table, 64 KiB at 4096 atoms; a block's codes are 200 KB at
  // sparsity 16. A CTA takes a whole block where that leaves enough of them, down to a tile for
  // each warp where it does not.
  const int64_t wanted = int64_t{kScoreCtas} * sm_count;
  plan.chunk_tiles = kBlockTiles;
  while (plan.chunk_tiles > kScoreWarps &&
         plan.num_units * (p.num_blocks + 1) * (kBlockTiles / plan.chunk_tiles) < wanted) {
    plan.chunk_tiles /= 2;
  }
  plan.block_chunks = kBlockTiles / plan.chunk_tiles;
  plan.tail_chunks = ceil_div(plan.tail_slots / kTileTokens, plan.chunk_tiles);
  plan.num_chunks = p.num_blocks * plan.block_chunks + plan.tail_chunks + plan.segments.buffer;

  // Likewise the CTAs that share the atoms of a block in the value pass: each of them computes the
  // weights of all of the block's tokens.
  plan.block_parts = 1;
  while (plan.block_parts < 8 && plan.num_units * p.num_blocks * plan.block_parts < wanted) {
    plan.block_parts *= 2;
  }
  plan.block_part_atoms = ceil_div(p.v_atoms, plan.block_parts);
  plan.block_parts = ceil_div(p.v_atoms, plan.block_part_atoms);
  // The sums of the tail are 32-bit integers in shared memory.
  plan.tail_part_atoms = std::min<int64_t>(p.v_atoms, kTableBytes / 4 / kUnitRows);
  plan.tail_parts = ceil_div(p.v_atoms, plan.tail_part_atoms);
  plan.atom_chunks = ceil_div(p.v_atoms, kProductAtoms);
  return plan;
}

}  // namespace kvcore::lexico
