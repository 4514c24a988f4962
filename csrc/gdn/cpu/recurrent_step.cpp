// gdn_recurrent_step on CPUs: heads of all sequences are shared out in memory order.
#include "gdn/cpu/recurrent_step.h"

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"

namespace kvcore::gdn::backend {

void recurrent_step(const RecurrentStepParams& p) {
  auto* const kernel = KVCORE_ISA_SELECT(recurrent_step_kernel);
  parallel_for(0, p.sizes.batch * p.sizes.v_heads, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch<float>({p.sizes.k_dim, p.sizes.v_dim});
    kernel(p, begin, end, scratch.get());
  });
}

}  // namespace kvcore::gdn::backend
