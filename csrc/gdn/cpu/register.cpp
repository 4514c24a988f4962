// Binds the ops of the family to the CPU.
#include <torch/csrc/stable/library.h>

#include "gdn/op.h"

namespace kvcore::gdn::backend {
const bool kHostReadsValues = true;
}  // namespace kvcore::gdn::backend

STABLE_TORCH_LIBRARY_IMPL(kvcore, CPU, m) {
  m.impl("gdn_chunk_scan", TORCH_BOX(&kvcore::gdn::gdn_chunk_scan));
  m.impl("gdn_chunk_scan_backward", TORCH_BOX(&kvcore::gdn::gdn_chunk_scan_backward));
  m.impl("gdn_recurrent_step", TORCH_BOX(&kvcore::gdn::gdn_recurrent_step));
  m.impl("gdn_recurrent_step_", TORCH_BOX(&kvcore::gdn::gdn_recurrent_step_));
  m.impl("gdn_conv1d", TORCH_BOX(&kvcore::gdn::gdn_conv1d));
  m.impl("gdn_conv1d_backward", TORCH_BOX(&kvcore::gdn::gdn_conv1d_backward));
  m.impl("gdn_conv1d_update", TORCH_BOX(&kvcore::gdn::gdn_conv1d_update));
}
