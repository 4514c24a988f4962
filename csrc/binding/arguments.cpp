#include "binding/arguments.h"

#include <algorithm>
#include <cmath>

namespace kvcore::binding {

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  KV_CHECK(shape_matches(tensor, shape), op, argument, format_shape(shape), format_shape(tensor));
  KV_CHECK(tensor.scalar_type() == dtype, op, argument, format_dtype(dtype),
           format_dtype(tensor.scalar_type()));
  KV_CHECK(same_device(tensor, like), op, argument, "on " + format_device(like),
           format_device(tensor));
  KV_CHECK(tensor.is_contiguous(), op, argument, "contiguous",
           "strides " + format_shape(tensor.strides()));
}

void check_input(const char* op, const char* argument, const Tensor& tensor) {
  KV_CHECK(tensor.dim() == 4, op, argument, "4-dimensional", format_shape(tensor));
  dtype_of(op, argument, tensor);
  const int64_t head_dim = tensor.size(3);
  KV_CHECK_ONE_OF(op, head_dim, 64, 96, 128, 256);
}

void check_heads(const char* op, const char* argument, const Tensor& q, int64_t kv_heads) {
  KV_CHECK(kv_heads >= 1, op, argument, "of at least 1 head", kv_heads);
  KV_CHECK(q.size(1) % kv_heads == 0, op, "q",
           "of a multiple of " + std::to_string(kv_heads) + " heads", q.size(1));
}

HostValues<> check_lens(const char* op, const char* argument, const Tensor& lens,
                        const Tensor& like, int64_t batch, int64_t limit, bool wanted) {
  check_tensor(op, argument, lens, ScalarType::Int, {batch}, like);
  HostValues<> values(lens, wanted);
  for (int64_t b = 0; values.readable() && b < batch; ++b) {
    KV_CHECK(values[b] >= 0 && values[b] <= limit, op, element_name(argument, {b}),
             "in [0, " + std::to_string(limit) + "]", values[b]);
  }
  return values;
}

int64_t check_cu_seqlens(const char* op, const char* argument, const Tensor& tensor,
                         const Tensor& like, int64_t num_tokens, bool wanted) {
  KV_CHECK(tensor.dim() == 1 && tensor.size(0) >= 1, op, argument, "[num_seqs + 1]",
           format_shape(tensor));
  check_tensor(op, argument, tensor, ScalarType::Int, {tensor.size(0)}, like);
  const int64_t num_seqs = tensor.size(0) - 1;
  const HostValues<> values(tensor, wanted);
  if (!values.readable()) return num_seqs;
  KV_CHECK(values[0] == 0, op, element_name(argument, {0}), "0", values[0]);
  for (int64_t i = 1; i <= num_seqs; ++i) {
    KV_CHECK(values[i] >= values[i - 1], op, element_name(argument, {i}),
             "at least " + std::to_string(values[i - 1]), values[i]);
  }
  KV_CHECK(values[num_seqs] == num_tokens, op, element_name(argument, {num_seqs}),
           std::to_string(num_tokens), values[num_seqs]);
  return num_seqs;
}

float check_scale(const char* op, std::optional<double> scale, int64_t dim) {
  const double factor = scale ? *scale : 1 / std::sqrt(static_cast<double>(dim));
  KV_CHECK(std::isfinite(static_cast<float>(factor)), op, "scale", "finite in float32", factor);
  return static_cast<float>(factor);
}

int64_t check_window(const char* op, std::optional<int64_t> window, bool causal) {
  if (!window) return 0;
  KV_CHECK(*window >= 1, op, "window", "at least 1 or None", *window);
  KV_CHECK(causal, op, "window", "None without causal", *window);
  // Wider than any context, and as first_key = end_key - window is computed, far from overflow.
  constexpr int64_t kMaxWindow = int64_t{1} << 62;
  return std::min(*window, kMaxWindow);
}

}  // namespace kvcore::binding
