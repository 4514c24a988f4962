#include "simt/warp.h"

namespace kvcore::simt {

void finish_vote(void* const (&brought)[kWarp], unsigned lanes) {
  unsigned ballot = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) != 0) ballot |= static_cast<const Vote*>(brought[i])->predicate << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    static_cast<Vote*>(brought[i])->ballot = ballot;
    static_cast<Vote*>(brought[i])->present = lanes;
  }
}

}  // namespace kvcore::simt
