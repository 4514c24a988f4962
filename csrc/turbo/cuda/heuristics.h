// How the attention kernels are launched, and why. Nothing here was measured on a GPU: the figures
// are counts of bytes, registers and CTAs (README, "CUDA"). Everything depends on shapes alone, so
// that a sequence's result does not depend on its neighbours.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cuda/grid.h"
#include "turbo/params.h"

namespace kvcore::turbo {

// ---- Decode

// Units in shared memory of each warp: one is read while three are on their way. With 4-bit pages
// of head_dim 128 that is 13 KiB a warp, 52 KiB a CTA: one CTA alone covers the 40 KiB that an
// H200's bandwidth times its latency asks of a multiprocessor, two and three leave room for uneven
// warps.
constexpr int kDecodeSlots = 4;

// Warps of a CTA. At head_dim 256 slots are twice as large, and two warps are what fits 99 KiB.
constexpr int decode_warps(int head_dim) { return head_dim <= 128 ? 4 : 2; }

// Rows of a tile: the 16 of an mma, or its first 8 where that is enough, which halves the softmax
// and the accumulators. At head_dim 256 the accumulators of 16 rows would spill.
constexpr int decode_tile_rows(int64_t head_dim, int64_t num_rows) {
  return num_rows <= 8 || head_dim > 128 ? 8 : 16;
}

// CTAs that the registers must leave room for on a multiprocessor: as many as shared memory does at
// head_dim 128. With 16 rows the accumulators take twice the registers, and the queries the bytes
// by which three CTAs would fit.
constexpr int decode_ctas(int head_dim, int rows) { return head_dim == 64 || rows == 8 ? 3 : 2; }

// Pages of a split when rows are few. A CTA reads 16 pages of 4 bit (141 KB at head_dim 128) in the
// time in which its share of an H200 delivers them, about 13 us with three CTAs to a
// multiprocessor, against 1 to 2 us to start up, which its neighbours hide; its partial result is 1
// to 2 % of what it read. Short contexts are split finer, to occupy 132 multiprocessors with 8 kv
// heads at batch 1: a warp has one page then.
constexpr int64_t kSplitPages = 16;
// Up to so many rows; with more, partial results would be a large part of the traffic, and there
// are more tiles.
constexpr int64_t kFewRows = 64;
// Up to so many rows the context is in at most kCoarseSplits parts, and beyond in one: their
// scratch memory grows with the rows.
constexpr int64_t kManyRows = 512;
constexpr int64_t kCoarseSplits = 8;

struct DecodePlan {
  int64_t group;     // q_heads / kv_heads
  int64_t num_rows;  // of a kv head: q_len * group
  int64_t num_tiles;
  int64_t split_pages;
  int64_t num_splits;
  int tile_rows;
};

inline DecodePlan decode_plan(const DecodeParams& p) {
  const int64_t group = p.q_heads / p.store.kv_heads;
  const int64_t num_rows = group * p.q_len;
  const int64_t table_pages = p.store.max_pages + 1;  // with the open one
  int64_t split_pages = table_pages;
  if (num_rows <= kFewRows) {
    split_pages = table_pages <= 64 ? 4 : table_pages <= 256 ? 8 : kSplitPages;
  } else if (num_rows <= kManyRows) {
    split_pages = std::max(kSplitPages, ceil_div(table_pages, kCoarseSplits));
  }
  // Sequences may be known to be shorter than the table: that saves CTAs, and changes no split.
  const int64_t pages = std::min(table_pages, ceil_div(p.max_seq_len, kPageTokens));
  const int tile_rows = decode_tile_rows(p.store.head_dim, num_rows);
  return {.group = group,
          .num_rows = num_rows,
          .num_tiles = ceil_div(num_rows, tile_rows),
          .split_pages = split_pages,
          .num_splits = std::max<int64_t>(ceil_div(pages, split_pages), 1),
          .tile_rows = tile_rows};
}

// Rows of a CTA of the merge kernel, a warp each.
constexpr int kMergeRows = 4;

// ---- Prefill

constexpr int kAttentionWarps = 4;

// Tiles of 16 query rows of a warp. Two use each byte of K and V from shared memory twice: with
// one, a warp reads 16 KiB for 64 mma, 128 cycles of shared memory for at most 128 of the matrix
// units. At head_dim 256 the accumulators of two would need 256 registers of a thread's 255.
constexpr int attention_warp_tiles(int head_dim) { return head_dim <= 128 ? 2 : 1; }
constexpr int attention_tile_rows(int head_dim) {
  return kAttentionWarps * 16 * attention_warp_tiles(head_dim);
}

// CTAs that the registers must leave room for on a multiprocessor: two of 128 threads are what 255
// registers of a thread allow. It has to be said: without it, one word spills for sm_120 at
// head_dim 128 (nvcc 13.0).
constexpr int kAttentionCtas = 2;

// Pages in shared memory: one is read while the next arrives. A page's products take longer than a
// trip to L2, so that more would gain nothing and cost a second CTA on the multiprocessor.
constexpr int kAttentionStages = 2;

}  // namespace kvcore::turbo
