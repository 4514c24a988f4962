// One plain struct per op: what a backend gets after op_*.cpp has checked everything; at the end,
// the functions that get them.
//
// Dimensions: batch, q_heads, kv_heads (divides q_heads), q_len, kv_len, head_dim. A pointer is
// followed by its shape; every array is contiguous unless it is a view; "may be null" is said.
#pragma once

#include <cstdint>

#include "core/view.h"
#include "turbo/layout.h"

namespace kvcore::turbo {

/// One allocation of the pool; its row size tells its bit width.
struct Slab {
  uint8_t* data;       // [num_blocks, block_bytes(bits, head_dim)]
  int64_t num_blocks;  // <= kMaxSlabBlocks
  int bits;            // 8, 4 or 2
};

/// The quantized store of one layer. Index 0 of a dimension of size 2 is K, index 1 is V.
struct Store {
  const Slab* slabs;           // [num_slabs], host memory
  int64_t num_slabs;           // <= kMaxSlabs
  const int32_t* block_table;  // [batch, 2, kv_heads, max_pages] block entries
  int64_t max_pages;
  uint8_t* tail;      // [batch, 2, kv_heads, kTailSlots, block_bytes(8, head_dim)]
  int32_t* seq_lens;  // [batch] tokens stored; page count is seq_lens / 64, tail the rest
  int64_t batch;
  int64_t kv_heads;
  int64_t head_dim;
};

/// K is stored as (k - mean) / balance; queries are multiplied by balance.
struct Calibration {
  const float* k_balance;  // [batch, kv_heads, head_dim], may be null (ones)
  const float* k_mean;     // [batch, kv_heads, head_dim], may be null (zeros)
};

struct CalibrateParams {
  InputView k;                  // [batch, kv_heads, kv_len, head_dim]
  const int32_t* left_padding;  // [batch] leading tokens to leave out, may be null (none)
  int64_t batch, kv_heads, kv_len, head_dim;
  int64_t rotary_dim;  // channels c and c + rotary_dim / 2 share a balance; 0: no pairs
  bool balance, subtract_mean;
  float* k_balance;  // [batch, kv_heads, head_dim]
  float* k_mean;     // [batch, kv_heads, head_dim]
};

struct HeadPriorityParams {
  InputView x;                  // [batch, heads, tokens, head_dim]
  const int32_t* left_padding;  // [batch], may be null
  int64_t batch, heads, tokens, head_dim;
  float* priority;  // [batch, heads]
};

struct AppendParams {
  InputView k, v;  // [batch, kv_heads, num_new, head_dim]
  int64_t num_new;
  const int32_t* left_padding;  // [batch] leading new tokens to leave out, may be null
  Calibration calibration;
  Store store;  // seq_lens, tail and pool are written
  float tail_margin;
  float* tail_scale;     // [batch, 2, kv_heads] scale with which the next tail opens
  int64_t* clamp_count;  // [batch, 2, kv_heads] codes clamped so far
};

struct RewindParams {
  Store store;              // seq_lens and tail are written
  const int32_t* new_lens;  // [batch], 0 <= new_lens <= seq_lens
};

struct DequantizeParams {
  Store store;
  Calibration calibration;
  int64_t kv_len;    // tokens of the outputs; >= every seq_lens
  bool right_align;  // the last token of each sequence at kv_len - 1, zeros before the first
  OutputView k, v;   // [batch, kv_heads, kv_len, head_dim]
};

/// Attention scalars shared by both attention ops.
struct Softmax {
  float scale;
  bool causal;          // bottom-right aligned
  int64_t window;       // a query sees the last `window` keys up to its own; 0: all
  bool exact;           // exact exponentials; otherwise SAS with
  float sas_threshold;  // scores this far (negative) from the running maximum count as zero
};

/// First and last + 1 page of a part of the context.
struct PageRange {
  int64_t begin, end;
};

/// What any of a sequence's query tokens [first_token, last_token] can see.
constexpr PageRange visible_pages(const Softmax& softmax, int64_t q_len, int64_t kv_len,
                                  int64_t first_token, int64_t last_token) {
  int64_t first_key = 0, end_key = kv_len;
  if (softmax.causal) {
    end_key = last_token + 1 + kv_len - q_len;
    if (softmax.window > 0) first_key = first_token + 1 + kv_len - q_len - softmax.window;
  }
  if (first_key < 0) first_key = 0;
  if (end_key <= first_key) return {0, 0};
  return {first_key / kPageTokens, (end_key + kPageTokens - 1) / kPageTokens};
}

struct DecodeParams {
  InputView q;  // [batch, q_heads, q_len, head_dim]
  int64_t q_heads, q_len;
  Calibration calibration;
  Store store;  // read only; seq_lens includes the q_len newest tokens
  Softmax softmax;
  OutputView out;       // [batch, q_heads, q_len, head_dim]
  float* lse;           // [batch, q_heads, q_len]
  int64_t max_seq_len;  // bound of seq_lens for sizing scratch: known on the CPU
};

struct AttentionParams {
  InputView q;     // [batch, q_heads, q_len, head_dim]
  InputView k, v;  // [batch, kv_heads, kv_len, head_dim]
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  const int32_t* cu_seqlens_q;  // [num_seqs + 1], may be null; with it batch is 1, tokens packed
  const int32_t* cu_seqlens_k;  // [num_seqs + 1], null exactly when cu_seqlens_q is
  int64_t num_seqs;
  Calibration calibration;  // per batch entry; with cu_seqlens one for all sequences
  Softmax softmax;
  OutputView out;  // [batch, q_heads, q_len, head_dim]
  float* lse;      // [batch, q_heads, q_len]
};

/// What each library (kvcore_cpu, kvcore_cuda, kvcore_simt) defines for itself.
namespace backend {

void attention(const AttentionParams& params);
void calibrate(const CalibrateParams& params);
void head_priority(const HeadPriorityParams& params);
void append(const AppendParams& params);
void rewind(const RewindParams& params);
void dequantize(const DequantizeParams& params);
void decode(const DecodeParams& params);

}  // namespace backend
}  // namespace kvcore::turbo
