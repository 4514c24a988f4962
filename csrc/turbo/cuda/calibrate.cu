#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "turbo/cuda/calibrate_kernel.cuh"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo::backend {

void calibrate(const CalibrateParams& p) {
  const int64_t heads = p.batch * p.kv_heads;
  if (heads == 0) return;
  const int64_t max_blocks = (p.kv_len + kPageTokens - 1) / kPageTokens;
  Scratch sums(byte_count({heads, max_blocks, p.head_dim, sizeof(double)}));
  Scratch ranges(byte_count({2, heads, max_blocks, p.head_dim, sizeof(float)}));
  float* low = reinterpret_cast<float*>(ranges.data());
  const CalibrateArguments a{.scan = {.rows = device_rows(p.k),
                                      .left_padding = p.left_padding,
                                      .heads = p.kv_heads,
                                      .num_tokens = p.kv_len,
                                      .max_blocks = max_blocks,
                                      .head_dim = static_cast<int>(p.head_dim),
                                      .sums = reinterpret_cast<double*>(sums.data()),
                                      .low = low,
                                      .high = low + heads * max_blocks * p.head_dim,
                                      .poison = false},
                             .rotary_dim = static_cast<int>(p.rotary_dim),
                             .balance = p.balance,
                             .subtract_mean = p.subtract_mean,
                             .k_balance = p.k_balance,
                             .k_mean = p.k_mean,
                             .error_flags = error_flags()};
  dispatch_dtype(p.k.dtype,
                 [&](auto t) { launch_scan<typename decltype(t)::type>(a.scan, heads); });
  launch(calibrate_kernel, grid_of(heads), a.scan.head_dim, a.scan.head_dim * sizeof(float),
         current_stream(), a);
}

}  // namespace kvcore::turbo::backend
