// What the CPU kernels of the chunked gated delta rule share: declarations, and the memory of one
// worker. Matrices over tokens have kRowStride elements per row, squares kSquareStride: constants,
// so that products address them for free, and no power of two, so that rows do not share cache
// sets.
#pragma once

#include "core/cpu/isa.h"
#include "gdn/params.h"

namespace kvcore::gdn {

constexpr int kRowStride = kMaxHeadDim + 16;
constexpr int kSquareStride = kChunk + 16;

using Rows = float[kChunk * kRowStride];
using Square = float[kChunk * kSquareStride];
using Tall = float[kMaxHeadDim * kSquareStride];  // rows over channels, columns over tokens

/// Rows of a state lie this far apart: an odd number of cache lines, so that a column of tiles does
/// not fall into a few sets of the first-level cache.
constexpr int state_stride(int columns) { return (columns / kHeadDimMultiple | 1) * 16; }
using State = float[kMaxHeadDim * state_stride(kMaxHeadDim)];

/// One sequence: a batch entry, or a run of packed tokens.
struct Sequence {
  int64_t batch_idx;
  int64_t seq_idx;  // of the states
  int64_t begin;    // its first token
  int64_t length;
};

inline Sequence sequence_of(const Sequences& s, const Sizes& sizes, int64_t idx) {
  if (s.cu_seqlens == nullptr) return {idx, idx, 0, sizes.num_tokens};
  return {0, idx, s.cu_seqlens[idx], s.cu_seqlens[idx + 1] - s.cu_seqlens[idx]};
}

/// Per-token values of one chunk. Tokens past its end have beta 0, factors 0 and the last G.
struct TokenValues {
  float G[kChunk];      // log decay summed from the chunk's first token
  float exp_G[kChunk];  // e^G
  float rest[kChunk];   // e^(G_last - G): what is left at the chunk's end
  float beta[kChunk];
  float q_factor[kChunk];  // rstd of q, and scale
  float k_factor[kChunk];  // rstd of k
};

struct alignas(64) ForwardWorkspace {
  // Of a key head.
  Rows q, k;          // as given: factors are applied to products
  Rows pairs;         // packed operands: k, pairs along tokens
  Tall k_transposed;  // second operand
  Tall k_by_channel;  // first operand
  Square kk, qk;      // k k^T and q k^T as given
  // Of one of its value heads.
  Square l, x, a, p;
  Rows w, u, o;
  State state_packed;
  TokenValues tokens;
};

/// A range of value heads of one sequence, of one key head or of several whole ones, and a range of
/// their value channels.
struct ScanTask {
  Sequence sequence;
  int64_t head_begin, head_end;  // of the values
  int v_begin, v_end;
  float* states;  // [head_end - head_begin, k_dim, state_stride(v_end - v_begin)]
};

struct alignas(64) BackwardWorkspace {
  // Operands of q and k as given, here and below: factors are applied to products. A first operand
  // [tokens, channels], the transposed one, and a second one of the rows.
  Rows q, k, q_pairs, k_pairs;
  Tall k_transposed, q_by_channel, k_by_channel;
  Rows v, d_out;
  Rows d_out_given;  // packed operands: as a first operand
  Square qk, kk, x, a, p, decay, x_transposed, da, dp, e, f;
  Rows ks, w, u, du, dw, y, dq, dk;
  Rows first, second;  // operands of a product, made for it
  Rows u_first;
  Square square;
  Tall transposed;
  State packed, transposed_state;
  TokenValues tokens;
  float dG[kChunk], dbeta[kChunk];
};

// Chunks whose states the backward keeps: 4 MiB at k_dim = v_dim = 128. Longer sequences keep the
// states between segments and compute those within one again.
constexpr int64_t kSegmentChunks = 64;

inline int64_t chunks_of(const Sequence& s) { return (s.length + kChunk - 1) / kChunk; }
inline int64_t segments_of(const Sequence& s) {
  return (chunks_of(s) + kSegmentChunks - 1) / kSegmentChunks;
}

/// One value head of one sequence. States are [k_dim, state_stride(v_dim)].
struct BackwardTask {
  Sequence sequence;
  int64_t head;
  int v_begin, v_end;   // value channels; all of them but where states are computed
  bool first_of_group;  // dq and dk are set, not added to
  bool last_of_group;   // dq and dk are finished and written
  float* segments;      // [segments of the sequence] states before them
  float* states;        // [kSegmentChunks] states before the chunks of a segment
  float* d_state;       // gradient of the state after the chunk that comes next
  float* d_states;      // [kSegmentChunks] of those after the chunks; null without kChunk
  float* dqk;           // [2, length, k_dim] sums over the heads of the group; null if there is one
  float* dA_log;        // [chunks of the sequence] sums over a chunk's tokens
  float* ddt_bias;
};

/// Steps of a head's backward, in this order, the middle ones for its segments from last to first.
/// Gradients of states run through the sequence, but each value channel by itself; the rest is of
/// one chunk. So few heads occupy many threads if the former are computed and kept first.
enum class BackwardStep {
  kFirstStates,   // before all segments; the last d_state
  kStates,        // of a segment
  kDStates,       // of a segment, for kChunk
  kChunk,         // one chunk: everything else
  kChunks,        // instead of these two: chunks from last to first, d_state on the way
  kInitialState,  // d_initial_state
};
struct BackwardWork {
  BackwardStep step;
  int64_t segment = 0;
  int64_t chunk = 0;  // in the segment
};

// clang-format off
KVCORE_ISA_DECLARE(
void chunk_scan_kernel(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w);
void chunk_scan_backward_kernel(const ChunkScanBackwardParams& p, const BackwardTask& task,
                                const BackwardWork& work, BackwardWorkspace& w);
)
// clang-format on

}  // namespace kvcore::gdn
