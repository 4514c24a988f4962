// RMSNorm of a range of rows, and its gradients, per ISA level.
#pragma once

#include "core/cpu/isa.h"
#include "gdn/params.h"

namespace kvcore::gdn {

/// Floats of a row of scratch memory: whole vectors at every level, the last one filled up.
constexpr int64_t norm_row_floats(int64_t channels) { return (channels + 15) / 16 * 16; }

// clang-format off
KVCORE_ISA_DECLARE(
/// The factors of the channels, weight + offset, then zeros up to norm_row_floats.
void rms_norm_weight_kernel(const InputView& weight, int64_t channels, float offset, float* out);
/// Rows [begin, end), batch entry by batch entry; `weight`: what rms_norm_weight_kernel wrote.
void rms_norm_kernel(const RmsNormParams& p, const float* weight, int64_t begin, int64_t end);
/// The same, with the rows' sum of the weight's gradient; `row` and `dweight` are rows of scratch.
void rms_norm_backward_kernel(const RmsNormBackwardParams& p, const float* weight, int64_t begin,
                              int64_t end, float* row, float* dweight);
/// Channels [begin, end): the sums of all blocks of rows in their order.
void rms_norm_sum_kernel(const float* partial, int64_t num_blocks, int64_t row_floats,
                         int64_t begin, int64_t end, float* dweight);
)
// clang-format on

}  // namespace kvcore::gdn
