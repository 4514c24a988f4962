// What the kernels of gdn_chunk_scan_backward get, and what they leave for each other in scratch
// memory. The chunks of all sequences have slots (sequences.cuh); a window is a run of slots for
// which states and their gradients are kept.
#pragma once

#include <cstddef>

#include "core/cuda/rows.cuh"
#include "gdn/cuda/backward_squares.cuh"
#include "gdn/cuda/gate.cuh"
#include "gdn/cuda/sequences.cuh"

namespace kvcore::gdn::backward {

/// Per-token values of a chunk; past its end G is the last one, beta 0.
struct alignas(16) TokenScalars {
  float G[kChunk];
  float exp_G[kChunk];  // e^G
  float rest[kChunk];   // e^(G_last - G)
  float beta[kChunk];
};

struct BackwardArgs {
  ChunkScanBackwardParams p;
  DeviceGate gate;
  SequenceTable table;
  int group;  // v_heads / k_heads
  // fp32 copies: q and k with their norms.
  const float *q, *k;      // [batch, num_tokens, k_heads, k_dim]
  const float *v, *d_out;  // [batch, num_tokens, v_heads, v_dim]
  // The window: slots [begin, end).
  int64_t window, begin, end;
  // Of the window's chunks, [slot - begin, v_heads, ...].
  float *a, *p_scores;  // A, P: [kChunk, kChunk]
  TokenScalars* tokens;
  float *state, *d_state;  // before and after the chunk, transposed: [v_dim, k_dim]
  float *w, *u, *du, *dw;  // [kChunk, v_dim]
  float* dqk;  // [slot - begin, k_heads, 2, kChunk, k_dim]: sums over a key head's group
  // Between windows: [v_heads, k_dim, v_dim] each.
  float* boundaries;       // the state at the beginning of each window
  float* d_boundaries[2];  // its gradient at the window's end (read) and beginning (written)
  // Of all slots: parts of the gradients of A_log and dt_bias.
  int64_t num_slots;
  float* gates;  // [2, num_slots, v_heads]
};

__device__ __forceinline__ int dim_k(const BackwardArgs& a) {
  return static_cast<int>(a.p.sizes.k_dim);
}
__device__ __forceinline__ int dim_v(const BackwardArgs& a) {
  return static_cast<int>(a.p.sizes.v_dim);
}
/// Blocks of kChunk in a dimension, and the columns or tiles that are left in one of them.
__device__ __forceinline__ int blocks_of(int dim) { return (dim + kChunk - 1) / kChunk; }
__device__ __forceinline__ int left_in(int dim, int block) {
  return min(kChunk, dim - block * kChunk);
}
__device__ __forceinline__ int tiles_in(int dim, int block) { return left_in(dim, block) / 8; }

/// A chunk of a head in the window's arrays.
__device__ __forceinline__ int64_t window_index(const BackwardArgs& a, int64_t slot, int64_t head) {
  return (slot - a.begin) * a.p.sizes.v_heads + head;
}
/// A block of channels of a chunk's tokens, in an array [batch, num_tokens, heads, dim].
__device__ __forceinline__ Block token_block(const BackwardArgs& a, const float* array,
                                             const Chunk& chunk, int64_t heads, int64_t head,
                                             int dim, int block) {
  const int64_t token = chunk.batch_idx * a.p.sizes.num_tokens + chunk.begin;
  return {array + (token * heads + head) * dim + block * kChunk, heads * dim, chunk.num_tokens,
          left_in(dim, block)};
}
__device__ __forceinline__ Block key_block(const BackwardArgs& a, const float* array,
                                           const Chunk& chunk, int64_t k_head, int block) {
  return token_block(a, array, chunk, a.p.sizes.k_heads, k_head, dim_k(a), block);
}
/// A block of channels of a window's array [kChunk, v_dim].
__device__ __forceinline__ Block value_block(const BackwardArgs& a, const float* array,
                                             int64_t index, int block) {
  return {array + index * kChunk * dim_v(a) + block * kChunk, dim_v(a), kChunk,
          left_in(dim_v(a), block)};
}
/// A block of a window's state, [v_dim, k_dim].
__device__ __forceinline__ Block state_block(const BackwardArgs& a, const float* array,
                                             int64_t index, int v_block, int k_block) {
  const int64_t at = index * dim_v(a) + v_block * kChunk;
  return {array + at * dim_k(a) + k_block * kChunk, dim_k(a), left_in(dim_v(a), v_block),
          left_in(dim_k(a), k_block)};
}
__device__ __forceinline__ Block square_block(const float* array, int64_t index) {
  return {array + index * kChunk * kChunk, kChunk, kChunk, kChunk};
}
/// Rows of X, as the forward saved them.
__device__ __forceinline__ Block inverse_block(const BackwardArgs& a, const Chunk& chunk,
                                               int64_t head) {
  const int64_t v_heads = a.p.sizes.v_heads;
  const int64_t token = chunk.batch_idx * a.p.sizes.num_tokens + chunk.begin;
  return {a.p.x_inverse + (token * v_heads + head) * kChunk, v_heads * kChunk, chunk.num_tokens,
          kChunk};
}

}  // namespace kvcore::gdn::backward
