// RMSNorm on CUDA.
#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "gdn/cuda/rms_norm_launch.h"

namespace kvcore::gdn {
namespace {

int64_t rows_of(const NormSizes& sizes) { return sizes.batch * sizes.heads * sizes.num_tokens; }

}  // namespace

namespace backend {

void rms_norm(const RmsNormParams& p) {
  const NormArgs args = {.x = device_rows(p.x),
                         .weight = device_rows(p.weight),
                         .gate = device_rows(p.gate),
                         .sizes = p.sizes,
                         .num_rows = rows_of(p.sizes),
                         .eps = p.eps,
                         .weight_offset = p.weight_offset,
                         .out = p.out.data,
                         .rstd = p.rstd};
  dispatch_dtype(p.x.dtype,
                 [&](auto type) { launch_rms_norm<typename decltype(type)::type>(args); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  const int64_t num_rows = rows_of(p.sizes), cta_rows = norm_cta_rows(num_rows, p.sizes.channels);
  NormBackwardArgs args = {.d_out = device_rows(p.d_out),
                           .x = device_rows(p.x),
                           .weight = device_rows(p.weight),
                           .gate = device_rows(p.gate),
                           .rstd = p.rstd,
                           .sizes = p.sizes,
                           .num_rows = num_rows,
                           .cta_rows = cta_rows,
                           .num_ctas = ceil_div(num_rows, cta_rows),
                           .weight_offset = p.weight_offset,
                           .dx = p.dx.data,
                           .dgate = p.dgate.data,
                           .partial = nullptr,
                           .dweight = p.dweight};
  const Scratch partial(byte_count({args.num_ctas, p.sizes.channels, sizeof(float)}));
  args.partial = reinterpret_cast<float*>(partial.data());
  dispatch_dtype(p.x.dtype,
                 [&](auto type) { launch_rms_norm_backward<typename decltype(type)::type>(args); });
  launch(rms_norm_sums_kernel<kNormSumThreads>, grid_of(ceil_div(p.sizes.channels, kWarpSize)),
         kNormSumThreads, kNormSumThreads * sizeof(float), current_stream(), args);
}

}  // namespace backend
}  // namespace kvcore::gdn
