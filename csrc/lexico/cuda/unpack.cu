#include "lexico/cuda/unpack_kernel.cuh"

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"

namespace kvcore::lexico::backend {

void unpack(const UnpackParams& p) {
  check_aligned_16(p.tail, "lexico_unpack: tail");
  const int64_t tiles = ceil_div(p.kv_len, kTileTokens);
  launch(unpack_kernel, grid_of(p.batch * p.kv_heads * tiles), kUnpackThreads, 0, current_stream(),
         p, tiles);
}

}  // namespace kvcore::lexico::backend
