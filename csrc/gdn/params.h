// One plain struct per op: what a backend gets after op_*.cpp has checked everything; at the end,
// the functions that get them.
//
// Dimensions: batch; num_tokens (packed sequences together); k_heads (divides v_heads: value head h
// reads key head h / (v_heads / k_heads)); k_dim, v_dim. A pointer is followed by its shape; every
// array is contiguous unless it is a view; "may be null" is said.
#pragma once

#include <cstdint>

#include "core/view.h"
#include "gdn/layout.h"

namespace kvcore::gdn {

struct Sizes {
  int64_t batch, num_tokens, k_heads, v_heads, k_dim, v_dim;
};

/// How a token's decay and write strength come from what the op was given. Views are
/// [batch, v_heads, num_tokens] with a channel stride of 0.
struct Gate {
  InputView g;           // log decay; with A_log what enters the softplus
  InputView beta;        // write strength; with beta_sigmoid its logit
  const float* A_log;    // [v_heads], may be null: then g is the log decay
  const float* dt_bias;  // [v_heads], may be null (zeros)
  bool beta_sigmoid;
  float beta_scale;  // of the sigmoid: 1 or 2
};

/// Where sequences begin and end.
struct Sequences {
  const int32_t* cu_seqlens;  // [num_seqs + 1], may be null; with it batch is 1, tokens packed
  int64_t num_seqs;           // batch without cu_seqlens
};

struct ChunkScanParams {
  InputView q, k;  // [batch, k_heads, num_tokens, k_dim]
  InputView v;     // [batch, v_heads, num_tokens, v_dim]
  Gate gate;
  Sizes sizes;
  Sequences sequences;
  float scale;
  bool qk_l2norm;
  bool state_v_first;          // states are [..., v_dim, k_dim]
  bool save_residuals;         // write g_cumsum, x_inverse and rstd
  const float* initial_state;  // [num_seqs, v_heads, k_dim, v_dim], may be null (zeros)
  OutputView out;              // [batch, num_tokens, v_heads, v_dim]
  float* final_state;          // [num_seqs, v_heads, k_dim, v_dim]
  float* g_cumsum;             // [batch, num_tokens, v_heads] sum of log decays within the chunk
  float* x_inverse;            // [batch, num_tokens, v_heads, kChunk] rows of X
  float* rstd;                 // [2, batch, num_tokens, k_heads] of q and k; null without qk_l2norm
};

struct ChunkScanBackwardParams {
  InputView d_out;  // [batch, v_heads, num_tokens, v_dim]
  InputView q, k, v;
  Gate gate;
  const float* g_cumsum;   // [batch, num_tokens, v_heads]
  const float* x_inverse;  // [batch, num_tokens, v_heads, kChunk]
  const float* rstd;       // [2, batch, num_tokens, k_heads]; null without qk_l2norm
  Sizes sizes;
  Sequences sequences;
  float scale;
  bool qk_l2norm;
  bool state_v_first;
  const float* initial_state;  // [num_seqs, v_heads, k_dim, v_dim], may be null
  const float* d_final_state;  // [num_seqs, v_heads, k_dim, v_dim], may be null (zeros)
  OutputView dq, dk;           // [batch, num_tokens, k_heads, k_dim]
  OutputView dv;               // [batch, num_tokens, v_heads, v_dim]
  OutputView dg, dbeta;        // [batch, num_tokens, v_heads]
  float* dA_log;               // [v_heads], null without A_log
  float* ddt_bias;             // [v_heads], null without dt_bias
  float* d_initial_state;      // [num_seqs, v_heads, k_dim, v_dim], null without initial_state
};

struct RecurrentStepParams {
  InputView q, k;  // [batch, k_heads, num_tokens, k_dim]
  InputView v;     // [batch, v_heads, num_tokens, v_dim]
  Gate gate;
  Sizes sizes;
  float scale;
  bool qk_l2norm;
  bool state_v_first;
  float* state;                  // [num_slots, v_heads, k_dim, v_dim]
  int64_t num_slots;             // at least batch without state_indices
  const int32_t* state_indices;  // [batch, num_columns] slots, negative: none; may be null
  int64_t num_columns;           // 1: first and last state share a slot; else >= num_tokens
  const int32_t* num_accepted;   // [batch] start from column num_accepted - 1; may be null (1)
  OutputView out;                // [batch, num_tokens, v_heads, v_dim]
};

/// Views with a head stride of 0: tokens of x are [batch, num_tokens, channels], taps of weight
/// [width, channels]. The last tap meets the token itself.
struct Conv1DParams {
  InputView x;       // [batch, num_tokens, channels]
  InputView weight;  // [width, channels]
  InputView bias;    // [channels]; data may be null (zeros)
  int64_t batch, channels, num_tokens, width;
  Sequences sequences;
  bool silu;
  OutputView out;  // [batch, num_tokens, channels]
};

struct Conv1DBackwardParams {
  InputView d_out;            // [batch, num_tokens, channels]
  InputView x, weight, bias;  // as in Conv1DParams
  int64_t batch, channels, num_tokens, width;
  Sequences sequences;
  bool silu;
  OutputView dx;   // [batch, num_tokens, channels]
  float* dweight;  // [channels, width]
  float* dbias;    // [channels]
};

struct Conv1DUpdateParams {
  InputView x, weight, bias;  // as in Conv1DParams
  int64_t batch, channels, num_tokens, width;
  OutputView conv_state;         // [num_slots, channels, state_len], newest value last
  int64_t num_slots, state_len;  // state_len >= width - 1
  const int32_t* state_indices;  // [batch] slots, negative: none; may be null
  bool silu;
  OutputView out;  // [batch, num_tokens, channels]
};

/// Rows that a norm is taken of; the leading dimensions of a tensor, merged into three.
struct NormSizes {
  int64_t batch, heads, num_tokens, channels;
};

/// Channels of a row are next to each other in memory.
struct RmsNormParams {
  InputView x;       // [batch, heads, num_tokens, channels]
  InputView weight;  // [channels]
  InputView gate;    // as x; data may be null (none)
  NormSizes sizes;
  float eps;
  float weight_offset;
  OutputView out;  // [batch, heads, num_tokens, channels]
  float* rstd;     // [batch, heads, num_tokens]
};

struct RmsNormBackwardParams {
  InputView d_out, x, weight, gate;  // as in RmsNormParams; d_out as x
  const float* rstd;                 // [batch, heads, num_tokens]
  NormSizes sizes;
  float weight_offset;
  OutputView dx;     // [batch, heads, num_tokens, channels]
  OutputView dgate;  // as dx; data is null without gate
  float* dweight;    // [channels]
};

/// What each library (kvcore_cpu, kvcore_cuda, kvcore_simt) defines for itself.
namespace backend {

void chunk_scan(const ChunkScanParams& params);
void chunk_scan_backward(const ChunkScanBackwardParams& params);
void recurrent_step(const RecurrentStepParams& params);
void conv1d(const Conv1DParams& params);
void conv1d_backward(const Conv1DBackwardParams& params);
void conv1d_update(const Conv1DUpdateParams& params);
void rms_norm(const RmsNormParams& params);
void rms_norm_backward(const RmsNormBackwardParams& params);

}  // namespace backend
}  // namespace kvcore::gdn
