// Binds the ops of the family to the CPU.
#include "binding/register.h"
#include "lexico/op.h"

namespace kvcore::lexico::backend {
const bool kHostReadsValues = true;
}  // namespace kvcore::lexico::backend

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("lexico_encode", KVCORE_OP(kvcore::lexico::lexico_encode));
  m.impl("lexico_reconstruct", KVCORE_OP(kvcore::lexico::lexico_reconstruct));
}
