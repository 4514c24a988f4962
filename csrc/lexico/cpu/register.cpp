// Binds the ops of the family to the CPU.
#include <torch/csrc/stable/library.h>

#include "lexico/op.h"

namespace kvcore::lexico::backend {
const bool kHostReadsValues = true;
}  // namespace kvcore::lexico::backend

STABLE_TORCH_LIBRARY_IMPL(kvcore, CPU, m) {
  m.impl("lexico_encode", TORCH_BOX(&kvcore::lexico::lexico_encode));
  m.impl("lexico_reconstruct", TORCH_BOX(&kvcore::lexico::lexico_reconstruct));
}
