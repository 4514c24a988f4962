// Contiguous copies of inputs that the scan's kernels cannot read as they are: rows whose 16-byte
// units are not aligned or have gaps, fp16, which is computed with as fp32, and whatever the
// backward reads.
#pragma once

#include "gdn/params.h"

namespace kvcore::gdn {

/// x as [batch, num_tokens, heads, channels] of T, times a factor for each row, which may be null.
/// float: x is of any type; BFloat16: of that.
template <class T>
void pack(const InputView& x, const float* factor, const Sizes& s, int64_t heads, int64_t channels,
          T* to);

}  // namespace kvcore::gdn
