// The recurrent step of some heads, per ISA level.
#pragma once

#include "core/cpu/isa.h"
#include "gdn/params.h"

namespace kvcore::gdn {

// clang-format off
KVCORE_ISA_DECLARE(
/// All tokens of value heads [begin, end), counted through all sequences. scratch: [k_dim, v_dim], a
/// state to forget.
void recurrent_step_kernel(const RecurrentStepParams& p, int64_t begin, int64_t end,
                           float* scratch);
)
// clang-format on

}  // namespace kvcore::gdn
