#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "turbo/cuda/head_priority_kernel.cuh"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo::backend {

void head_priority(const HeadPriorityParams& p) {
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return;
  const int64_t max_blocks = (p.tokens + kPageTokens - 1) / kPageTokens;
  Scratch ranges(byte_count({2, heads, max_blocks, p.head_dim, sizeof(float)}));
  float* low = reinterpret_cast<float*>(ranges.data());
  const HeadPriorityArguments a{.scan = {.rows = device_rows(p.x),
                                         .left_padding = p.left_padding,
                                         .heads = p.heads,
                                         .num_tokens = p.tokens,
                                         .max_blocks = max_blocks,
                                         .head_dim = static_cast<int>(p.head_dim),
                                         .sums = nullptr,
                                         .low = low,
                                         .high = low + heads * max_blocks * p.head_dim,
                                         .poison = true},
                                .priority = p.priority,
                                .error_flags = error_flags()};
  dispatch_dtype(p.x.dtype,
                 [&](auto t) { launch_scan<typename decltype(t)::type>(a.scan, heads); });
  launch(head_priority_kernel, grid_of(heads), a.scan.head_dim, 2 * a.scan.head_dim * sizeof(float),
         current_stream(), a);
}

}  // namespace kvcore::turbo::backend
