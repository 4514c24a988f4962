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
using State = float[kMaxHeadDim * kMaxHeadDim];   // [k_dim, v_dim] or a range of its columns

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
  Rows q, k, v;       // as given: factors are applied to products
  Tall k_transposed;  // packed operands: pairs along channels
  Rows k_packed;      // packed operands: pairs along tokens
  Square qk, kk, x, a;
  Rows w, u, o;
  State state, state_packed;
  TokenValues tokens;
};

/// A range of value channels of one head of one sequence.
struct ScanTask {
  Sequence sequence;
  int64_t head;  // of the values
  int v_begin, v_end;
  bool first_part;  // writes what does not depend on value channels
};

struct alignas(64) BackwardWorkspace {
  Rows q, k, v, d_out;  // q and k normalized
  Tall transposed;
  Square qk, kk, x, a, p, decay, x_transposed, da, dp, e, f;
  Rows ks, w, u, du, dw, y, dq, dk, t;
  State state, state_transposed, d_state, d_state_transposed;
  TokenValues tokens;
  float dG[kChunk], dbeta[kChunk];
};

/// One value head of one sequence.
struct BackwardTask {
  Sequence sequence;
  int64_t head;
  bool first_of_group;  // dq and dk are set, not added to
  bool last_of_group;   // dq and dk are finished and written
  float* states;        // [kSegmentChunks, k_dim, v_dim]
  float* segments;      // [segments of the sequence, k_dim, v_dim]
  float* dqk;           // [2, length, k_dim] sums over the heads of the group; null if there is one
  float* dA_log;        // one value each, of this head and sequence; may be null
  float* ddt_bias;
};

// Chunks whose states the backward keeps: 4 MiB at k_dim = v_dim = 128. Longer sequences keep the
// states between segments and compute those within one again.
constexpr int64_t kSegmentChunks = 64;

// clang-format off
KVCORE_ISA_DECLARE(
void chunk_scan_kernel(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w);
void chunk_scan_backward_kernel(const ChunkScanBackwardParams& p, const BackwardTask& task,
                                BackwardWorkspace& w);
)
// clang-format on

}  // namespace kvcore::gdn
