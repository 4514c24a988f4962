// The causal depthwise convolution on CUDA.
#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "gdn/cuda/conv1d_launch.h"
#include "gdn/cuda/conv1d_update_kernel.cuh"
#include "gdn/cuda/invalid_kernel.cuh"

namespace kvcore::gdn {
namespace {

ConvGrid grid_over(int64_t channels, int64_t num_tokens) {
  return {.channel_blocks = grid_of(ceil_div(channels, kConvThreads * kConvChannels)),
          .token_blocks = grid_of(ceil_div(num_tokens, kConvTokens)),
          .num_tokens = num_tokens};
}

}  // namespace

namespace backend {

void conv1d(const Conv1DParams& p) {
  ConvArgs args = {.x = device_rows(p.x),
                   .taps = conv_taps(p.weight, p.bias, p.channels, p.width),
                   .table = sequence_table(p.sequences, p.num_tokens),
                   .grid = grid_over(p.channels, p.num_tokens),
                   .silu = p.silu,
                   .out = p.out.data};
  const SequenceCheck check(args.table);
  dispatch_dtype(p.x.dtype,
                 [&](auto type) { launch_conv1d<typename decltype(type)::type>(args, p.batch); });
  check.poison({{p.out.data, p.out.dtype, p.batch * p.num_tokens * p.channels}});
}

void conv1d_backward(const Conv1DBackwardParams& p) {
  ConvBackwardArgs args = {.d_out = device_rows(p.d_out),
                           .x = device_rows(p.x),
                           .taps = conv_taps(p.weight, p.bias, p.channels, p.width),
                           .table = sequence_table(p.sequences, p.num_tokens),
                           .grid = grid_over(p.channels, p.num_tokens),
                           .num_tiles = p.batch * ceil_div(p.num_tokens, kConvTokens),
                           .silu = p.silu,
                           .dx = p.dx.data,
                           .partial = nullptr,
                           .dweight = p.dweight,
                           .dbias = p.dbias};
  const Scratch partial(byte_count({args.num_tiles, kConvSums, p.channels, sizeof(float)}));
  args.partial = reinterpret_cast<float*>(partial.data());
  const SequenceCheck check(args.table);
  if (args.num_tiles > 0) {
    dispatch_dtype(p.x.dtype, [&](auto type) {
      launch_conv1d_backward<typename decltype(type)::type>(args, p.batch);
    });
  }
  launch(conv1d_sums_kernel<kConvThreads>,
         dim3(grid_of(ceil_div(p.channels, kConvThreads)), kConvSums), kConvThreads, 0,
         current_stream(), args);
  check.poison({{p.dx.data, p.dx.dtype, p.batch * p.num_tokens * p.channels},
                {p.dweight, Dtype::kFloat32, p.channels * p.width},
                {p.dbias, Dtype::kFloat32, p.channels}});
}

void conv1d_update(const Conv1DUpdateParams& p) {
  const InputView state = {.data = p.conv_state.data,
                           .dtype = p.conv_state.dtype,
                           .batch_stride = p.channels * p.state_len,
                           .head_stride = 0,
                           .token_stride = 1,
                           .channel_stride = p.state_len};
  const unsigned channel_blocks = grid_of(ceil_div(p.channels, kConvThreads));
  const ConvUpdateArgs args = {.x = device_rows(p.x),
                               .state = device_rows(state),
                               .taps = conv_taps(p.weight, p.bias, p.channels, p.width),
                               .conv_state = p.conv_state,
                               .num_tokens = p.num_tokens,
                               .state_len = p.state_len,
                               .slots = {p.state_indices, p.batch, 1, p.num_slots},
                               .silu = p.silu,
                               .out = p.out,
                               .channel_blocks = channel_blocks,
                               .error_flags = error_flags()};
  launch(conv1d_update_kernel<kConvThreads>,
         grid_of(byte_count({p.batch, int64_t{channel_blocks}})), kConvThreads, 0, current_stream(),
         args);
}

}  // namespace backend
}  // namespace kvcore::gdn
