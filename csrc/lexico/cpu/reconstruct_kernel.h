// Kernel of lexico_reconstruct: works on one thread.
#pragma once

#include "core/cpu/isa.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// Vectors [begin, end) of [batch, heads, tokens].
KVCORE_ISA_DECLARE(void reconstruct_kernel(const ReconstructParams& p, int64_t begin, int64_t end))

}  // namespace kvcore::lexico
