// Binds the ops of the family to the backend of the library that is built.
#include "binding/register.h"
#include "turbo/op.h"

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("turbo_attention", KVCORE_OP(kvcore::turbo::turbo_attention));
  m.impl("turbo_calibrate", KVCORE_OP(kvcore::turbo::turbo_calibrate));
  m.impl("turbo_head_priority", KVCORE_OP(kvcore::turbo::turbo_head_priority));
  m.impl("turbo_quantize", KVCORE_OP(kvcore::turbo::turbo_quantize));
  m.impl("turbo_append", KVCORE_OP(kvcore::turbo::turbo_append));
  m.impl("turbo_rewind", KVCORE_OP(kvcore::turbo::turbo_rewind));
  m.impl("turbo_dequantize", KVCORE_OP(kvcore::turbo::turbo_dequantize));
  m.impl("turbo_decode", KVCORE_OP(kvcore::turbo::turbo_decode));
}
