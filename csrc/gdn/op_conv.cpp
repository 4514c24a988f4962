// The causal depthwise convolution in front of the delta rule.
#include "gdn/op.h"

namespace kvcore::gdn {
namespace {

using binding::kAnySize;

/// x [batch, channels, num_tokens], weight [channels, width], bias [channels].
void check_conv(const char* op, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias) {
  KV_CHECK_DIM(op, x, 3);
  binding::dtype_of(op, "x", x);
  KV_CHECK_SHAPE(op, weight, x.size(1), kAnySize);
  binding::dtype_of(op, "weight", weight);
  KV_CHECK_SAME_DEVICE(op, weight, x);
  const int64_t width = weight.size(1);
  KV_CHECK(
      width >= kMinConvWidth && width <= kMaxConvWidth, op, "weight",
      "of a width of " + std::to_string(kMinConvWidth) + " to " + std::to_string(kMaxConvWidth),
      width);
  if (!bias) return;
  KV_CHECK_SHAPE(op, *bias, x.size(1));
  binding::dtype_of(op, "bias", *bias);
  KV_CHECK_SAME_DEVICE(op, *bias, x);
}

InputView tokens_view(const char* op, const char* argument, const Tensor& x) {
  return {.data = x.const_data_ptr(),
          .dtype = binding::dtype_of(op, argument, x),
          .batch_stride = x.stride(0),
          .head_stride = 0,
          .token_stride = x.stride(2),
          .channel_stride = x.stride(1)};
}

InputView weight_view(const char* op, const Tensor& weight) {
  return {.data = weight.const_data_ptr(),
          .dtype = binding::dtype_of(op, "weight", weight),
          .batch_stride = 0,
          .head_stride = 0,
          .token_stride = weight.stride(1),
          .channel_stride = weight.stride(0)};
}

InputView bias_view(const char* op, const std::optional<Tensor>& bias) {
  if (!bias) return {};
  return {.data = bias->const_data_ptr(),
          .dtype = binding::dtype_of(op, "bias", *bias),
          .batch_stride = 0,
          .head_stride = 0,
          .token_stride = 0,
          .channel_stride = bias->stride(0)};
}

/// [batch, channels, num_tokens], channels next to each other in memory: what reads it splits them
/// into heads.
Tensor new_tokens(const char* op, const char* argument, const Tensor& x) {
  return binding::new_output(op, argument, x, {x.size(0), x.size(2), x.size(1)}, x.scalar_type());
}

Tensor channels_first(const Tensor& tokens) { return torch::stable::transpose(tokens, 1, 2); }

}  // namespace

Tensor gdn_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& cu_seqlens, bool silu, bool check_values) {
  constexpr const char* kOp = "gdn_conv1d";
  check_conv(kOp, x, weight, bias);
  const Sequences sequences =
      check_sequences(kOp, cu_seqlens, "x", x, x.size(0), x.size(2), check_values);
  Tensor out = new_tokens(kOp, "out", x);
  if (out.numel() > 0) {
    backend::conv1d({.x = tokens_view(kOp, "x", x),
                     .weight = weight_view(kOp, weight),
                     .bias = bias_view(kOp, bias),
                     .batch = x.size(0),
                     .channels = x.size(1),
                     .num_tokens = x.size(2),
                     .width = weight.size(1),
                     .sequences = sequences,
                     .silu = silu,
                     .out = binding::output_view(kOp, "out", out)});
  }
  return channels_first(out);
}

std::tuple<Tensor, Tensor, Tensor> gdn_conv1d_backward(const Tensor& d_out, const Tensor& x,
                                                       const Tensor& weight,
                                                       const std::optional<Tensor>& bias,
                                                       const std::optional<Tensor>& cu_seqlens,
                                                       bool silu) {
  constexpr const char* kOp = "gdn_conv1d_backward";
  check_conv(kOp, x, weight, bias);
  KV_CHECK_SHAPE(kOp, d_out, x.size(0), x.size(1), x.size(2));
  KV_CHECK_SAME_DTYPE(kOp, d_out, x);
  KV_CHECK_SAME_DEVICE(kOp, d_out, x);
  const Sequences sequences = check_sequences(kOp, cu_seqlens, "x", x, x.size(0), x.size(2), false);
  Tensor dx = new_tokens(kOp, "dx", x);
  const int64_t channels = x.size(1), width = weight.size(1);
  Tensor dweight = binding::new_output(kOp, "dweight", x, {channels, width}, ScalarType::Float);
  Tensor dbias = binding::new_output(kOp, "dbias", x, {channels}, ScalarType::Float);
  if (channels > 0) {
    backend::conv1d_backward({.d_out = tokens_view(kOp, "d_out", d_out),
                              .x = tokens_view(kOp, "x", x),
                              .weight = weight_view(kOp, weight),
                              .bias = bias_view(kOp, bias),
                              .batch = x.size(0),
                              .channels = channels,
                              .num_tokens = x.size(2),
                              .width = width,
                              .sequences = sequences,
                              .silu = silu,
                              .dx = binding::output_view(kOp, "dx", dx),
                              .dweight = binding::mutable_data<float>(dweight),
                              .dbias = binding::mutable_data<float>(dbias)});
  }
  return {channels_first(dx), dweight, dbias};
}

Tensor gdn_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                         const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& state_indices, bool silu, bool check_values) {
  constexpr const char* kOp = "gdn_conv1d_update";
  check_conv(kOp, x, weight, bias);
  const int64_t batch = x.size(0), channels = x.size(1), width = weight.size(1);
  KV_CHECK_SHAPE(kOp, conv_state, kAnySize, channels, kAnySize);
  KV_CHECK_DTYPE(kOp, conv_state, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  KV_CHECK_SAME_DEVICE(kOp, conv_state, x);
  KV_CHECK_CONTIGUOUS(kOp, conv_state);
  const int64_t num_slots = conv_state.size(0), state_len = conv_state.size(2);
  KV_CHECK(state_len >= width - 1, kOp, "conv_state",
           "of at least " + std::to_string(width - 1) + " tokens", state_len);
  if (state_indices) {
    check_tensor(kOp, "state_indices", *state_indices, ScalarType::Int, {batch}, x);
    check_slots(kOp, "state_indices", *state_indices, num_slots, check_values);
  } else {
    KV_CHECK(num_slots == batch, kOp, "conv_state",
             "of " + std::to_string(batch) + " slots without state_indices", num_slots);
  }
  binding::check_disjoint(
      kOp, {{"conv_state", conv_state}},
      {{"x", x}, {"weight", weight}, {"bias", bias}, {"state_indices", state_indices}});
  Tensor out = new_tokens(kOp, "out", x);
  if (out.numel() > 0) {
    backend::conv1d_update({.x = tokens_view(kOp, "x", x),
                            .weight = weight_view(kOp, weight),
                            .bias = bias_view(kOp, bias),
                            .batch = batch,
                            .channels = channels,
                            .num_tokens = x.size(2),
                            .width = width,
                            .conv_state = binding::output_view(kOp, "conv_state", conv_state),
                            .num_slots = num_slots,
                            .state_len = state_len,
                            .state_indices = binding::data<int32_t>(state_indices),
                            .silu = silu,
                            .out = binding::output_view(kOp, "out", out)});
  }
  return channels_first(out);
}

}  // namespace kvcore::gdn
