// Checks that the ops of the family share. Every one throws before anything is written.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
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

/// First to one past the last byte, whatever lies between elements.
std::pair<const uint8_t*, const uint8_t*> memory_of(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const uint8_t* begin = binding::data<uint8_t>(tensor);
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

}  // namespace

std::string element_name(const char* name, std::initializer_list<int64_t> indices) {
  return name + format_shape(indices);
}

HostValues::HostValues(const Tensor& tensor, bool wanted) {
  if (backend::kHostReadsValues) {
    values_ = binding::data<int32_t>(tensor);
  } else if (wanted) {
    copy_ = torch::stable::to(tensor, torch::stable::Device("cpu"));
    values_ = binding::data<int32_t>(*copy_);
  }
}

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  KV_CHECK(binding::shape_matches(tensor, shape), op, argument, format_shape(shape),
           format_shape(tensor));
  KV_CHECK(tensor.scalar_type() == dtype, op, argument, binding::format_dtype(dtype),
           binding::format_dtype(tensor.scalar_type()));
  KV_CHECK(binding::same_device(tensor, like), op, argument, "on " + binding::format_device(like),
           binding::format_device(tensor));
  KV_CHECK(tensor.is_contiguous(), op, argument, "contiguous",
           "strides " + format_shape(tensor.strides()));
}

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

float check_scale(const char* op, std::optional<double> scale, int64_t k_dim) {
  const double value = scale.value_or(1.0 / std::sqrt(static_cast<double>(k_dim)));
  KV_CHECK(std::isfinite(static_cast<float>(value)), op, "scale", "finite in float32", value);
  return static_cast<float>(value);
}

Sequences check_sequences(const char* op, const std::optional<Tensor>& cu_seqlens,
                          const char* like_name, const Tensor& like, int64_t batch,
                          int64_t num_tokens, bool check_values) {
  if (!cu_seqlens) return {.cu_seqlens = nullptr, .num_seqs = batch};
  const Tensor& tensor = *cu_seqlens;
  KV_CHECK(batch == 1, op, like_name, "of batch 1 with cu_seqlens", batch);
  KV_CHECK(tensor.dim() == 1 && tensor.size(0) >= 1, op, "cu_seqlens", "[num_seqs + 1]",
           format_shape(tensor));
  check_tensor(op, "cu_seqlens", tensor, ScalarType::Int, {tensor.size(0)}, like);
  const int64_t num_seqs = tensor.size(0) - 1;
  const HostValues values(tensor, check_values);
  if (values.readable()) {
    KV_CHECK(values[0] == 0, op, element_name("cu_seqlens", {0}), "0", values[0]);
    for (int64_t i = 1; i <= num_seqs; ++i) {
      KV_CHECK(values[i] >= values[i - 1], op, element_name("cu_seqlens", {i}),
               "at least " + std::to_string(values[i - 1]), values[i]);
    }
    KV_CHECK(values[num_seqs] == num_tokens, op, element_name("cu_seqlens", {num_seqs}),
             std::to_string(num_tokens), values[num_seqs]);
  }
  return {.cu_seqlens = binding::data<int32_t>(tensor), .num_seqs = num_seqs};
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
  const HostValues values(indices, check_values);
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

void check_apart(const char* op, const char* written_name, const Tensor& written,
                 std::initializer_list<std::pair<const char*, std::optional<Tensor>>> read) {
  if (written.numel() == 0) return;
  const auto [begin, end] = memory_of(written);
  for (const auto& [name, tensor] : read) {
    if (!tensor || tensor->numel() == 0) continue;
    const auto [other_begin, other_end] = memory_of(*tensor);
    KV_CHECK(other_end <= begin || end <= other_begin, op, written_name, "in memory of its own",
             std::string("that of ") + name);
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
