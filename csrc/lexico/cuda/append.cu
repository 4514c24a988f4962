#include "lexico/cuda/append_kernel.cuh"

#include <algorithm>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"

namespace kvcore::lexico::backend {

void append(const AppendParams& p) {
  check_aligned_16(p.k_tail, "lexico_append: k_tail");
  check_aligned_16(p.v_tail, "lexico_append: v_tail");
  const AppendArgs args = {
      .p = p,
      .capacity = std::min<int64_t>({p.k_tiles, p.v_tiles, kBlockTiles}) * kTileTokens,
      .num_tiles = std::min<int64_t>(ceil_div(p.num_new, kTileTokens) + 1, kBlockTiles),
      .error_flags = error_flags()};
  const int64_t ctas = p.batch * p.kv_heads * 2 * args.num_tiles;
  const cudaStream_t stream = current_stream();
  if (ctas > 0) launch(append_kernel, grid_of(ctas), kAppendThreads, 0, stream, args);
  launch(raise_lens_kernel, grid_of(ceil_div(p.batch, kAppendThreads)), kAppendThreads, 0, stream,
         args);
}

}  // namespace kvcore::lexico::backend
