#include "core/cpu/parallel.h"
#include "lexico/cpu/reconstruct_kernel.h"

namespace kvcore::lexico::backend {

void reconstruct(const ReconstructParams& p) {
  constexpr int64_t kVectorsPerThread = 64;
  auto* kernel = KVCORE_ISA_SELECT(reconstruct_kernel);
  parallel_for(0, p.batch * p.heads * p.tokens, kVectorsPerThread,
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace kvcore::lexico::backend
