// Exact attention: check arguments, allocate outputs, fill params, call the backend.
#include "dense/op.h"

namespace kvcore::dense {
namespace {

using binding::input_view;
using binding::new_output;
using binding::output_view;

void check_float(const char* op, const char* argument, const Tensor& tensor) {
  KV_CHECK(tensor.dim() == 4, op, argument, "4-dimensional", binding::format_shape(tensor));
  binding::dtype_of(op, argument, tensor);
}

/// The inputs of the forward, which the backward gets again.
Sizes check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_float(op, "q", q);
  check_float(op, "k", k);
  const int64_t head_dim = q.size(3);
  KV_CHECK(
      head_dim >= kHeadDimMultiple && head_dim <= kMaxHeadDim && head_dim % kHeadDimMultiple == 0,
      op, "head_dim",
      "a multiple of " + std::to_string(kHeadDimMultiple) + " up to " + std::to_string(kMaxHeadDim),
      head_dim);
  const int64_t batch = q.size(0), kv_heads = k.size(1), kv_len = k.size(2);
  KV_CHECK_SHAPE(op, k, batch, binding::kAnySize, binding::kAnySize, head_dim);
  binding::check_heads(op, "k", q, kv_heads);
  KV_CHECK_SHAPE(op, v, batch, kv_heads, kv_len, head_dim);
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    KV_CHECK(tensor->scalar_type() == q.scalar_type(), op, name,
             binding::format_dtype(q.scalar_type()) + " like q",
             binding::format_dtype(tensor->scalar_type()));
    KV_CHECK(binding::same_device(*tensor, q), op, name,
             "on " + binding::format_device(q) + " like q", binding::format_device(*tensor));
  }
  return {.batch = batch,
          .q_heads = q.size(1),
          .kv_heads = kv_heads,
          .q_len = q.size(2),
          .kv_len = kv_len,
          .head_dim = head_dim};
}

/// [batch, tokens, heads, head_dim] in memory: what a model's next projection, and the gradient of
/// its last one, read without a copy.
Tensor new_tokens(const char* op, const char* argument, const Tensor& like, const Tensor& shape) {
  return new_output(op, argument, like,
                    {shape.size(0), shape.size(2), shape.size(1), shape.size(3)},
                    like.scalar_type());
}
Tensor heads_first(const Tensor& tokens) { return torch::stable::transpose(tokens, 1, 2); }

}  // namespace

std::tuple<Tensor, Tensor> dense_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           bool causal, std::optional<double> scale) {
  constexpr const char* kOp = "dense_attention";
  const Sizes sizes = check_inputs(kOp, q, k, v);
  const float factor = binding::check_scale(kOp, scale, sizes.head_dim);
  Tensor out = new_tokens(kOp, "out", q, q);
  Tensor lse =
      new_output(kOp, "lse", q, {sizes.batch, sizes.q_heads, sizes.q_len}, ScalarType::Float);
  if (lse.numel() > 0) {
    backend::attention({.q = input_view(kOp, "q", q),
                        .k = input_view(kOp, "k", k),
                        .v = input_view(kOp, "v", v),
                        .sizes = sizes,
                        .causal = causal,
                        .scale = factor,
                        .out = output_view(kOp, "out", out),
                        .lse = binding::mutable_data<float>(lse)});
  }
  return {heads_first(out), lse};
}

std::tuple<Tensor, Tensor, Tensor> dense_attention_backward(const Tensor& d_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse,
                                                            const std::optional<Tensor>& d_lse,
                                                            bool causal,
                                                            std::optional<double> scale) {
  constexpr const char* kOp = "dense_attention_backward";
  const Sizes sizes = check_inputs(kOp, q, k, v);
  for (const auto& [name, tensor] : {std::pair{"d_out", &d_out}, std::pair{"out", &out}}) {
    KV_CHECK(
        binding::shape_matches(*tensor, {sizes.batch, sizes.q_heads, sizes.q_len, sizes.head_dim}),
        kOp, name, binding::format_shape(q), binding::format_shape(*tensor));
    KV_CHECK(tensor->scalar_type() == q.scalar_type(), kOp, name,
             binding::format_dtype(q.scalar_type()) + " like q",
             binding::format_dtype(tensor->scalar_type()));
    KV_CHECK(binding::same_device(*tensor, q), kOp, name,
             "on " + binding::format_device(q) + " like q", binding::format_device(*tensor));
  }
  const auto check_row_values = [&](const char* name, const Tensor& tensor) {
    binding::check_tensor(kOp, name, tensor, ScalarType::Float,
                          {sizes.batch, sizes.q_heads, sizes.q_len}, q);
  };
  check_row_values("lse", lse);
  if (d_lse) check_row_values("d_lse", *d_lse);
  const float factor = binding::check_scale(kOp, scale, sizes.head_dim);
  Tensor dq = new_tokens(kOp, "dq", q, q);
  Tensor dk = new_tokens(kOp, "dk", q, k);
  Tensor dv = new_tokens(kOp, "dv", q, v);
  if (dq.numel() + dk.numel() > 0) {
    backend::attention_backward({.d_out = input_view(kOp, "d_out", d_out),
                                 .q = input_view(kOp, "q", q),
                                 .out = input_view(kOp, "out", out),
                                 .k = input_view(kOp, "k", k),
                                 .v = input_view(kOp, "v", v),
                                 .lse = binding::data<float>(lse),
                                 .d_lse = binding::data<float>(d_lse),
                                 .sizes = sizes,
                                 .causal = causal,
                                 .scale = factor,
                                 .dq = output_view(kOp, "dq", dq),
                                 .dk = output_view(kOp, "dk", dk),
                                 .dv = output_view(kOp, "dv", dv)});
  }
  return {heads_first(dq), heads_first(dk), heads_first(dv)};
}

}  // namespace kvcore::dense
