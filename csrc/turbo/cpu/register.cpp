// Binds the ops of the family to the CPU.
#include <torch/csrc/stable/library.h>

#include "turbo/op.h"

namespace kvcore::turbo::backend {
const bool kHostReadsValues = true;
}  // namespace kvcore::turbo::backend

STABLE_TORCH_LIBRARY_IMPL(kvcore, CPU, m) {
  m.impl("turbo_attention", TORCH_BOX(&kvcore::turbo::turbo_attention));
  m.impl("turbo_calibrate", TORCH_BOX(&kvcore::turbo::turbo_calibrate));
  m.impl("turbo_head_priority", TORCH_BOX(&kvcore::turbo::turbo_head_priority));
  m.impl("turbo_quantize", TORCH_BOX(&kvcore::turbo::turbo_quantize));
  m.impl("turbo_append", TORCH_BOX(&kvcore::turbo::turbo_append));
  m.impl("turbo_rewind", TORCH_BOX(&kvcore::turbo::turbo_rewind));
  m.impl("turbo_dequantize", TORCH_BOX(&kvcore::turbo::turbo_dequantize));
  m.impl("turbo_decode", TORCH_BOX(&kvcore::turbo::turbo_decode));
}
