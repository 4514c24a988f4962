#include "lexico/cpu/reconstruct_kernel.h"
#include "core/cpu/rows.h"
#include "lexico/cpu/coefficients.h"

namespace kvcore::lexico::KVCORE_ISA {

void reconstruct_kernel(const ReconstructParams& p, int64_t begin, int64_t end) {
  alignas(64) float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  for (int64_t v = begin; v < end; ++v) {
    const float scale = widen(Half{p.scale[v]});
    for (int i = 0; i < head_dim; i += kLanes) store(row + i, splat(0.0f));
    for (int64_t j = v * p.sparsity; j < (v + 1) * p.sparsity; ++j) {
      const F32 value = splat(load_coefficient(p.coefficients, p.coefficient_type, j));
      const float* atom = p.dictionary + p.indices[j] * p.head_dim;
      for (int i = 0; i < head_dim; i += kLanes) {
        store(row + i, fma(value, load(atom + i), load(row + i)));
      }
    }
    // Last, so that a scale of NaN reaches a vector without coefficients.
    for (int i = 0; i < head_dim; i += kLanes) store(row + i, load(row + i) * splat(scale));
    narrow_row(row, head_dim, p.out, v * head_dim);
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
