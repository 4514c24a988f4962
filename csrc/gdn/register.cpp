// Binds the ops of the family to the backend of the library that is built.
#include "binding/register.h"
#include "gdn/op.h"

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("gdn_chunk_scan", KVCORE_OP(kvcore::gdn::gdn_chunk_scan));
  m.impl("gdn_chunk_scan_backward", KVCORE_OP(kvcore::gdn::gdn_chunk_scan_backward));
  m.impl("gdn_recurrent_step", KVCORE_OP(kvcore::gdn::gdn_recurrent_step));
  m.impl("gdn_recurrent_step_", KVCORE_OP(kvcore::gdn::gdn_recurrent_step_));
  m.impl("gdn_conv1d", KVCORE_OP(kvcore::gdn::gdn_conv1d));
  m.impl("gdn_conv1d_backward", KVCORE_OP(kvcore::gdn::gdn_conv1d_backward));
  m.impl("gdn_conv1d_update", KVCORE_OP(kvcore::gdn::gdn_conv1d_update));
  m.impl("gdn_rms_norm", KVCORE_OP(kvcore::gdn::gdn_rms_norm));
  m.impl("gdn_rms_norm_backward", KVCORE_OP(kvcore::gdn::gdn_rms_norm_backward));
}
