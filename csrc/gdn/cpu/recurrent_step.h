// The recurrent step of one head, per ISA level.
#pragma once

#include "core/cpu/isa.h"
#include "gdn/params.h"

namespace kvcore::gdn {

// clang-format off
KVCORE_ISA_DECLARE(
/// All tokens of one value head of one sequence. scratch: [k_dim, v_dim], a state to forget.
void recurrent_step_kernel(const RecurrentStepParams& p, int64_t batch, int64_t head,
                           float* scratch);
)
// clang-format on

}  // namespace kvcore::gdn
