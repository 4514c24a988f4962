// What the CPU kernels of exact attention share: tiles, prepared memory, and the kernels' names.
//
// Scores are computed transposed, [keys, queries]: what belongs to a query is then a lane, and
// weights leave the softmax as the second operand of V^T P^T or the first one of P^T dO, without a
// transposition of 2-byte values.
#pragma once

#include "core/cpu/isa.h"
#include "dense/params.h"

namespace kvcore::dense {

constexpr int kQueries = 64;  // of a tile
constexpr int kKeys = 128;    // of a block
// Rows of a matrix lie a cache line and more than a power of two apart, so that a column of it does
// not fall into a few sets of the first-level cache.
constexpr int padded(int columns) { return columns + 16; }

inline int64_t tiles_of(const Sizes& s) { return (s.q_len + kQueries - 1) / kQueries; }
inline int64_t blocks_of(const Sizes& s) { return (s.kv_len + kKeys - 1) / kKeys; }

/// Head dims that the kernels' strides are made for: the smallest that holds head_dim.
constexpr int stride_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : kMaxHeadDim;
}
// Of what is multiplied by weights: 1 if it is finite. A cache line.
constexpr int kFlags = 16;
// Floats that hold first operands of a block of keys, one by row and one by channel, and second
// ones of a tile of queries, by channel and by row; with the flags of the one that weights
// multiply.
constexpr int64_t block_floats(int64_t head_dim) {
  const int64_t dim = stride_dim(head_dim);
  return kKeys * padded(dim) + dim * padded(kKeys) + kFlags;
}
constexpr int64_t tile_floats(int64_t head_dim) {
  const int64_t dim = stride_dim(head_dim);
  return dim * padded(kQueries) + kQueries * padded(dim) + kFlags;
}

/// A head's keys and values for the forward: blocks of K by row and V by channel.
struct KeyTask {
  int64_t batch, kv_head, block;
  float* prepared;  // [block_floats]
};

struct QueryTask {
  int64_t batch, q_head, tile;
  const float* prepared;  // [blocks][block_floats] of its key head
};

struct alignas(64) Workspace {
  float rows[kKeys * padded(kMaxHeadDim)];   // as given, or to be written
  float pairs[kKeys * padded(kMaxHeadDim)];  // packed operands: the same, pairs along tokens
  float q_by_channel[kMaxHeadDim * padded(kQueries)];
  float out_by_channel[kMaxHeadDim * padded(kQueries)];
  float scores[kKeys * padded(kQueries)];
  float d_weights[kKeys * padded(kQueries)];
  float first_weights[kKeys * padded(kQueries)];  // packed operands
  float first_scores[kKeys * padded(kQueries)];
  float second_scores[kKeys * padded(kQueries)];
};

/// A query head of the backward, with the keys that it shares with others.
struct BackwardTask {
  int64_t batch, kv_head, q_head;
  float* keys;     // [blocks][block_floats] K by row and by channel
  float* values;   // [blocks][kKeys, padded(dim)] V by row
  float* dk;       // [blocks][kKeys, padded(dim)] sums over the query heads
  float* dv;       // likewise
  float* queries;  // [tiles][tile_floats] Q by channel, and by row in pairs of rows
  float* d_out;    // likewise
  float* rows;     // [tiles][2, kQueries] lse to base 2, and what is subtracted from dP
  float* dq;       // [tiles][dim, padded(kQueries)]
};

/// Steps of the backward, in this order; each is of one block of keys or of one tile of queries.
enum class BackwardStep {
  kLoadKeys,      // of a block, for all query heads
  kLoadQueries,   // of a tile
  kBlock,         // dk and dv of a block; dq of the tiles, block after block
  kBlockKeys,     // or, so that blocks do not wait for each other: dk and dv of a block,
  kTileQueries,   // and dq of a tile
  kStoreQueries,  // of a tile
  kStoreKeys,     // of a block, after the last query head
};

// clang-format off
KVCORE_ISA_DECLARE(
void load_keys_kernel(const AttentionParams& p, const KeyTask& task, Workspace& w);
void attention_kernel(const AttentionParams& p, const QueryTask& task, Workspace& w);
void attention_backward_kernel(const AttentionBackwardParams& p, const BackwardTask& task,
                               BackwardStep step, int64_t index, Workspace& w);
)
// clang-format on

}  // namespace kvcore::dense
