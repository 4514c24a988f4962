#include "lexico/cuda/unseal_kernel.cuh"

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"

namespace kvcore::lexico::backend {

void unseal(const UnsealParams& p) {
  check_aligned_16(p.k_block, "lexico_unseal: k_block");
  check_aligned_16(p.v_block, "lexico_unseal: v_block");
  const int64_t heads = p.batch * p.kv_heads;
  if (heads == 0) return;
  const cudaStream_t stream = current_stream();
  launch(unseal_k_kernel, grid_of(heads), kUnsealThreads, sizeof(KBlockTiles), stream, p,
         error_flags());
  launch(unseal_v_kernel, grid_of(heads * (kBlockTokens / kUnsealThreads)), kUnsealThreads,
         sizeof(UnsealVSmem), stream, p, error_flags());
}

}  // namespace kvcore::lexico::backend
