// gdn_recurrent_step on CUDA: one launch.
#include "core/dispatch.h"
#include "gdn/cuda/heuristics.h"
#include "gdn/cuda/recurrent_step_launch.h"

namespace kvcore::gdn::backend {

void recurrent_step(const RecurrentStepParams& p) {
  if (p.sizes.batch == 0 || p.sizes.num_tokens == 0) return;
  dispatch_bool(p.state_v_first, [&](auto v_first) {
    dispatch<8, 16>("loads", step_loads(p.sizes.k_dim),
                    [&](auto loads) { launch_recurrent_step<v_first(), loads()>(p); });
  });
}

}  // namespace kvcore::gdn::backend
