// Kernels of the store: each works on one thread, on one head of K (kv = 0) or V (kv = 1).
#pragma once

#include "core/cpu/isa.h"
#include "turbo/params.h"

namespace kvcore::turbo {

/// What turbo_calibrate needs to know of the tokens of one head: arrays of [head_dim].
struct ChannelRange {
  float* low;   // least finite value, +inf without one
  float* high;  // largest finite value, -inf without one
};

/// What an append does to one sequence.
struct AppendRange {
  int64_t batch_idx;
  int64_t padding;  // leading new tokens that are left out
  int64_t begin;    // first position that is written: tokens stored before
  int64_t end;      // one past the last; begin < end

  int64_t first_page() const { return begin / kPageTokens; }
  int64_t last_page() const { return (end - 1) / kPageTokens; }
  // Pages [bulk_begin, bulk_end) are new, full and not among the last two touched: they go to the
  // pool without a trace in the tail, so in any order and in parallel.
  int64_t bulk_begin() const { return (begin + kPageTokens - 1) / kPageTokens; }
  int64_t bulk_end() const {
    return last_page() - 1 > bulk_begin() ? last_page() - 1 : bulk_begin();
  }
};

// Sums of a block of at most 64 tokens into sums [head_dim], in order; widens `range` by them.
KVCORE_ISA_DECLARE(void calibrate_kernel(const CalibrateParams& p, int64_t batch_idx,
                                         int64_t head_idx, int64_t token_begin, int64_t token_end,
                                         double* sums, ChannelRange range))

// amax [head_dim] of the finite |k - mean|, the hard way: for ranges whose ends overflow.
KVCORE_ISA_DECLARE(void calibrate_amax_kernel(const CalibrateParams& p, int64_t batch_idx,
                                              int64_t head_idx, int64_t token_begin,
                                              int64_t token_end, const float* mean, float* amax))

// Widens `range` by tokens [token_begin, token_end); false if one of their values is not finite.
KVCORE_ISA_DECLARE(bool head_priority_kernel(const HeadPriorityParams& p, int64_t batch_idx,
                                             int64_t head_idx, int64_t token_begin,
                                             int64_t token_end, ChannelRange range))

// One bulk page; returns the largest of its finite magnitudes.
KVCORE_ISA_DECLARE(float append_page_kernel(const AppendParams& p, const AppendRange& range, int kv,
                                            int64_t head_idx, int64_t page_idx))

// Every other page, in order, and the scale of the tail; bulk_amax is the largest result of
// append_page_kernel for this head.
KVCORE_ISA_DECLARE(void append_tail_kernel(const AppendParams& p, const AppendRange& range, int kv,
                                           int64_t head_idx, float bulk_amax))

// Puts page_idx, which is in the pool, back into its tail slot.
KVCORE_ISA_DECLARE(void rewind_kernel(const RewindParams& p, int64_t batch_idx, int kv,
                                      int64_t head_idx, int64_t page_idx))

// Output rows of one page, the open one included.
KVCORE_ISA_DECLARE(void dequantize_kernel(const DequantizeParams& p, int64_t batch_idx, int kv,
                                          int64_t head_idx, int64_t page_idx))

// Zeroes the output rows before and after the tokens of a sequence.
KVCORE_ISA_DECLARE(void dequantize_padding_kernel(const DequantizeParams& p, int64_t batch_idx,
                                                  int kv, int64_t head_idx))

}  // namespace kvcore::turbo
