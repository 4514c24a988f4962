// Launch of dequantize_kernel.cuh.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "turbo/cuda/dequantize_kernel.cuh"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo {

template <class T>
void launch_dequantize(const DequantizeParams& p) {
  const Store& s = p.store;
  // Pages of a sequence and 64s of rows that it leaves empty are at most one more than fit.
  const int64_t ctas_per_head = (p.kv_len + kPageTokens - 1) / kPageTokens + 1;
  const int64_t ctas = s.batch * 2 * s.kv_heads * ctas_per_head;
  dispatch_slabs(s.num_slabs, [&](auto slabs) {
    const DequantizeArguments<slabs()> a{.k_balance = p.calibration.k_balance,
                                         .k_mean = p.calibration.k_mean,
                                         .kv_len = p.kv_len,
                                         .ctas_per_head = ctas_per_head,
                                         .right_align = p.right_align,
                                         .out = {p.k.data, p.v.data},
                                         .error_flags = error_flags(),
                                         .store = device_store<slabs()>(s)};
    launch(dequantize_kernel<T, slabs()>, grid_of(ctas), a.store.head_dim, 0, current_stream(), a);
  });
}

}  // namespace kvcore::turbo
