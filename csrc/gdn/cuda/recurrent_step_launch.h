// The launch of one instance of the recurrent step's kernel.
#pragma once

#include "gdn/params.h"

namespace kvcore::gdn {

/// Defined in instances/, for both layouts of states and kLoads of 8 and 16.
template <bool kVFirst, int kLoads>
void launch_recurrent_step(const RecurrentStepParams& p);

}  // namespace kvcore::gdn
