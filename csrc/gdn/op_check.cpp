// Checks that the ops of the family share. Every one throws before anything is written.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "gdn/op.h"

namespace kvcore::gdn {
namespace {

using binding::format_shape;
using binding::kAnySize;

void check_head_dim(const char* op, const char* argument, int64_t dim) {
  KV_CHECK(dim >= kHeadDimMultiple && dim <= kMaxHeadDim && dim % kHeadDimMultiple == 0, op,
           argument,
           "of a last dimension that is a multiple of " + std::to_string(kHeadDimMultiple) +
               " up to " + std::to_string(kMaxHeadDim),
           dim);
}

}  // namespace

Sizes check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& g, const Tensor& beta) {
  KV_CHECK_DIM(op, q, 4);
  binding::dtype_of(op, "q", q);
  const int64_t batch = q.size(0), num_tokens = q.size(1), k_heads = q.size(2), k_dim = q.size(3);
  check_head_dim(op, "q", k_dim);
  KV_CHECK_SHAPE(op, k, batch, num_tokens, k_heads, k_dim);
  KV_CHECK_SAME_DTYPE(op, k, q);
  KV_CHECK_SAME_DEVICE(op, k, q);
  KV_CHECK_SHAPE(op, v, batch, num_tokens, kAnySize, kAnySize);
  KV_CHECK_SAME_DTYPE(op, v, q);
  KV_CHECK_SAME_DEVICE(op, v, q);
  const int64_t v_heads = v.size(2), v_dim = v.size(3);
  check_head_dim(op, "v", v_dim);
  KV_CHECK(k_heads >= 1, op, "q", "of at least 1 head", k_heads);
  KV_CHECK(v_heads >= 1 && v_heads % k_heads == 0, op, "v",
           "of a multiple of " + std::to_string(k_heads) + " heads", v_heads);
  KV_CHECK_SHAPE(op, g, batch, num_tokens, v_heads);
  binding::dtype_of(op, "g", g);
  KV_CHECK_SAME_DEVICE(op, g, q);
  KV_CHECK_SHAPE(op, beta, batch, num_tokens, v_heads);
  binding::dtype_of(op, "beta", beta);
  KV_CHECK_SAME_DEVICE(op, beta, q);
  return {.batch = batch,
          .num_tokens = num_tokens,
          .k_heads = k_heads,
          .v_heads = v_heads,
          .k_dim = k_dim,
          .v_dim = v_dim};
}

Gate check_gate(const char* op, const GateTensors& tensors, const Sizes& sizes, bool check_values) {
  const auto& [g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval] = tensors;
  if (A_log) check_tensor(op, "A_log", *A_log, ScalarType::Float, {sizes.v_heads}, g);
  KV_CHECK(!dt_bias || A_log, op, "dt_bias", "None without A_log", format_shape(*dt_bias));
  if (dt_bias) check_tensor(op, "dt_bias", *dt_bias, ScalarType::Float, {sizes.v_heads}, g);
  KV_CHECK(!allow_neg_eigval || beta_sigmoid, op, "allow_neg_eigval", "False without beta_sigmoid",
           "True");
  if (check_values && !A_log) {
    const Tensor copy = torch::stable::contiguous(
        torch::stable::to(g, ScalarType::Float, std::nullopt, torch::stable::Device("cpu")));
    const float* values = binding::data<float>(copy);
    for (int64_t i = 0; i < copy.numel(); ++i) {
      KV_CHECK(values[i] <= 0.0f, op,
               element_name("g", {i / (sizes.num_tokens * sizes.v_heads),
                                  i / sizes.v_heads % sizes.num_tokens, i % sizes.v_heads}),
               "at most 0", values[i]);
    }
  }
  return {.g = gate_view(op, "g", g),
          .beta = gate_view(op, "beta", beta),
          .A_log = binding::data<float>(A_log),
          .dt_bias = binding::data<float>(dt_bias),
          .beta_sigmoid = beta_sigmoid,
          .beta_scale = allow_neg_eigval ? 2.0f : 1.0f};
}

Sequences check_sequences(const char* op, const std::optional<Tensor>& cu_seqlens,
                          const char* like_name, const Tensor& like, int64_t batch,
                          int64_t num_tokens, bool check_values) {
  if (!cu_seqlens) return {.cu_seqlens = nullptr, .num_seqs = batch};
  KV_CHECK(batch == 1, op, like_name, "of batch 1 with cu_seqlens", batch);
  const int64_t num_seqs =
      binding::check_cu_seqlens(op, "cu_seqlens", *cu_seqlens, like, num_tokens, check_values);
  return {.cu_seqlens = binding::data<int32_t>(*cu_seqlens), .num_seqs = num_seqs};
}

void check_states(const char* op, const char* argument, const Tensor& states, int64_t num_states,
                  const Sizes& sizes, bool state_v_first, const Tensor& like) {
  const int64_t rows = state_v_first ? sizes.v_dim : sizes.k_dim;
  const int64_t columns = state_v_first ? sizes.k_dim : sizes.v_dim;
  check_tensor(op, argument, states, ScalarType::Float, {num_states, sizes.v_heads, rows, columns},
               like);
}

void check_slots(const char* op, const char* argument, const Tensor& indices, int64_t num_slots,
                 bool check_values) {
  const HostValues<> values(indices, check_values);
  if (!values.readable()) return;
  const int64_t columns = indices.dim() == 2 ? indices.size(1) : 1;
  const auto name = [&](int64_t i) {
    return indices.dim() == 2 ? element_name(argument, {i / columns, i % columns})
                              : element_name(argument, {i});
  };
  std::vector<std::pair<int32_t, int64_t>> slots;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    KV_CHECK(values[i] >= -1 && values[i] < num_slots, op, name(i),
             "in [-1, " + std::to_string(num_slots) + ")", values[i]);
    if (values[i] >= 0) slots.emplace_back(values[i], i);
  }
  std::sort(slots.begin(), slots.end());
  for (size_t i = 1; i < slots.size(); ++i) {
    KV_CHECK(slots[i].first != slots[i - 1].first, op, name(slots[i].second),
             "a slot that no other entry names", slots[i].first);
  }
}

InputView head_view(const char* op, const char* argument, const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .dtype = binding::dtype_of(op, argument, tensor),
          .batch_stride = tensor.stride(0),
          .head_stride = tensor.stride(2),
          .token_stride = tensor.stride(1),
          .channel_stride = tensor.stride(3)};
}

InputView gate_view(const char* op, const char* argument, const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .dtype = binding::dtype_of(op, argument, tensor),
          .batch_stride = tensor.stride(0),
          .head_stride = tensor.stride(2),
          .token_stride = tensor.stride(1),
          .channel_stride = 0};
}

}  // namespace kvcore::gdn
