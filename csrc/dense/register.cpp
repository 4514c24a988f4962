// Binds the ops of the family to the backend of the library that is built.
#include "binding/register.h"
#include "dense/op.h"

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("dense_attention", KVCORE_OP(kvcore::dense::dense_attention));
  m.impl("dense_attention_backward", KVCORE_OP(kvcore::dense::dense_attention_backward));
}
