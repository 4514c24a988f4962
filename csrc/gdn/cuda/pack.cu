#include "gdn/cuda/pack.h"

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "gdn/cuda/pack_kernel.cuh"

namespace kvcore::gdn {
namespace {

template <class From, class To>
void launch_pack(const PackArgs& args, To* to) {
  if (args.num_fours == 0) return;
  launch(pack_kernel<From, To>, grid_of(ceil_div(args.num_fours, kPackThreads)), kPackThreads, 0,
         current_stream(), args, to);
}

PackArgs pack_args(const InputView& x, const float* factor, const Sizes& s, int64_t heads,
                   int64_t channels) {
  return {.from = device_rows(x),
          .factor = factor,
          .num_tokens = s.num_tokens,
          .heads = heads,
          .num_channels = static_cast<int>(channels),
          .num_fours = byte_count({s.batch, s.num_tokens, heads, channels}) / 4};
}

}  // namespace

template <>
void pack(const InputView& x, const float* factor, const Sizes& s, int64_t heads, int64_t channels,
          BFloat16* to) {
  launch_pack<BFloat16>(pack_args(x, factor, s, heads, channels), to);
}
template <>
void pack(const InputView& x, const float* factor, const Sizes& s, int64_t heads, int64_t channels,
          float* to) {
  dispatch_dtype(x.dtype, [&](auto type) {
    launch_pack<typename decltype(type)::type>(pack_args(x, factor, s, heads, channels), to);
  });
}

}  // namespace kvcore::gdn
