// Binds the ops of the family to the backend of the library that is built.
#include "binding/register.h"
#include "lexico/op.h"

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("lexico_encode", KVCORE_OP(kvcore::lexico::lexico_encode));
  m.impl("lexico_reconstruct", KVCORE_OP(kvcore::lexico::lexico_reconstruct));
  m.impl("lexico_append", KVCORE_OP(kvcore::lexico::lexico_append));
  m.impl("lexico_seal", KVCORE_OP(kvcore::lexico::lexico_seal));
  m.impl("lexico_unseal", KVCORE_OP(kvcore::lexico::lexico_unseal));
  m.impl("lexico_unpack", KVCORE_OP(kvcore::lexico::lexico_unpack));
  m.impl("lexico_attention", KVCORE_OP(kvcore::lexico::lexico_attention));
}
