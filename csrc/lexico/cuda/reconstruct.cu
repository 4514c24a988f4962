#include "lexico/cuda/reconstruct_kernel.cuh"

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "lexico/cuda/dictionary.h"

namespace kvcore::lexico::backend {

void reconstruct(const ReconstructParams& p) {
  const int64_t num_vectors = p.batch * p.heads * p.tokens;
  const int64_t blocks = (num_vectors + kReconstructWarps - 1) / kReconstructWarps;
  const AlignedDictionary dictionary(p.dictionary, p.atoms, p.head_dim);
  ReconstructParams aligned = p;
  aligned.dictionary = dictionary.data();
  launch(reconstruct_kernel, dim3(grid_of(blocks)), dim3(kReconstructWarps * kWarpSize), 0,
         current_stream(), aligned, error_flags());
}

}  // namespace kvcore::lexico::backend
