#include "core/cpu/rows.h"
#include "core/cpu/vec.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::KVCORE_ISA {
namespace {

using namespace ::kvcore::KVCORE_ISA;

}  // namespace

bool head_priority_kernel(const HeadPriorityParams& p, int64_t batch_idx, int64_t head_idx,
                          int64_t token_begin, int64_t token_end, ChannelRange range) {
  alignas(64) float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  F32 poison = splat(0);
  for (int64_t t = token_begin; t < token_end; ++t) {
    widen_row(p.x, batch_idx, head_idx, t, head_dim, row);
    for (int c = 0; c < head_dim; c += kLanes) {
      const F32 x = load(row + c), low = load(range.low + c);
      store(range.low + c, select(less(x, low), x, low));
      store(range.high + c, max(x, load(range.high + c)));
      // x * 0 is NaN exactly for a non-finite x.
      poison = fma(x, splat(0), poison);
    }
  }
  return reduce_add(poison) == 0;
}

}  // namespace kvcore::turbo::KVCORE_ISA
