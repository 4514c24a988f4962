// What the decode kernels get, and how the context is shared out among their CTAs.
#pragma once

#include "turbo/cuda/heuristics.h"
#include "turbo/cuda/store.cuh"

namespace kvcore::turbo {

/// Attention of one row to one split of the context.
struct DecodePartial {
  float m, l;       // running maximum times log2(e) and sum; a poisoned row's l is NaN
  float mean_term;  // the term of lse, the same in every split
};

struct DecodeArgs {
  DecodeParams p;  // its store is in `store`
  DeviceStore<kFewSlabs> store;
  // [batch, 2, kv_heads, max_pages] BlockRefs, null unless the pool has more than kFewSlabs slabs.
  const unsigned long long* refs;
  DecodePlan plan;
  // Both null with one split: then the outputs are written at once.
  DecodePartial* partials;  // [batch, kv_heads, num_splits, num_rows]
  float* partial_o;         // [batch, kv_heads, num_splits, num_rows, head_dim]
  float threshold;          // sas_threshold * log2(e); -inf for exact exponentials
  uint32_t* error_flags;
};

/// A tile of rows of one kv head of one sequence.
struct DecodeTile {
  int64_t batch_idx, kv_head, first_row;
  int num_rows;
  int64_t seq_len;
  bool is_valid;     // seq_len is
  PageRange pages;   // that some row of the tile sees
  PageRange splits;  // that have such pages; with one split [0, 1)
};

__device__ inline DecodeTile decode_tile(const DecodeArgs& args, int64_t batch_idx, int64_t kv_head,
                                         int64_t first_row, int num_rows) {
  const DecodeParams& p = args.p;
  DecodeTile tile = {.batch_idx = batch_idx,
                     .kv_head = kv_head,
                     .first_row = first_row,
                     .num_rows = num_rows,
                     .seq_len = args.store.seq_lens[batch_idx],
                     .is_valid = true,
                     .pages = {0, 0},
                     .splits = {0, 1}};
  tile.is_valid = tile.seq_len >= 0 && tile.seq_len <= max_seq_len(args.store);
  if (!tile.is_valid) return tile;
  const int64_t group = args.plan.group;
  tile.pages = visible_pages(p.softmax, p.q_len, tile.seq_len, first_row / group,
                             (first_row + num_rows - 1) / group);
  if (args.plan.num_splits > 1) {
    const int64_t pages = args.plan.split_pages;
    tile.splits = {tile.pages.begin / pages, (tile.pages.end + pages - 1) / pages};
  }
  return tile;
}

/// Index of a row's partial result in a split.
__device__ inline int64_t partial_index(const DecodeArgs& args, const DecodeTile& tile,
                                        int64_t split, int row) {
  const int64_t unit = tile.batch_idx * args.store.kv_heads + tile.kv_head;
  return (unit * args.plan.num_splits + split) * args.plan.num_rows + tile.first_row + row;
}

}  // namespace kvcore::turbo
