// Checks that the ops of the family share. Every one throws before anything is written.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "lexico/op.h"

namespace kvcore::lexico {

std::string element_name(const char* name, std::initializer_list<int64_t> indices) {
  return name + binding::format_shape(indices);
}

template <class T>
HostValues<T>::HostValues(const Tensor& tensor, bool wanted) {
  if (backend::kHostReadsValues) {
    values_ = binding::data<T>(tensor);
  } else if (wanted) {
    copy_ = torch::stable::to(tensor, torch::stable::Device("cpu"));
    values_ = binding::data<T>(*copy_);
  }
}
template class HostValues<float>;
template class HostValues<int16_t>;

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  KV_CHECK(binding::shape_matches(tensor, shape), op, argument, binding::format_shape(shape),
           binding::format_shape(tensor));
  KV_CHECK(tensor.scalar_type() == dtype, op, argument, binding::format_dtype(dtype),
           binding::format_dtype(tensor.scalar_type()));
  KV_CHECK(binding::same_device(tensor, like), op, argument, "on " + binding::format_device(like),
           binding::format_device(tensor));
  KV_CHECK(tensor.is_contiguous(), op, argument, "contiguous",
           "strides " + binding::format_shape(tensor.strides()));
}

void check_input(const char* op, const char* argument, const Tensor& tensor) {
  KV_CHECK(tensor.dim() == 4, op, argument, "4-dimensional", binding::format_shape(tensor));
  binding::dtype_of(op, argument, tensor);
  const int64_t head_dim = tensor.size(3);
  KV_CHECK_ONE_OF(op, head_dim, 64, 96, 128, 256);
}

int64_t check_dictionary(const char* op, const char* argument, const Tensor& dictionary,
                         int64_t head_dim, const Tensor& like) {
  check_tensor(op, argument, dictionary, ScalarType::Float, {binding::kAnySize, head_dim}, like);
  const int64_t atoms = dictionary.size(0);
  KV_CHECK(atoms >= 1 && atoms <= kMaxAtoms, op, argument,
           "of 1 to " + std::to_string(kMaxAtoms) + " atoms", atoms);
  return atoms;
}

CoefficientType check_codes(const char* op, const char* indices_name, const Tensor& indices,
                            const char* coefficients_name, const Tensor& coefficients,
                            const char* scale_name, const Tensor& scale) {
  KV_CHECK(indices.dim() == 4, op, indices_name, "4-dimensional", binding::format_shape(indices));
  const int64_t batch = indices.size(0), heads = indices.size(1), tokens = indices.size(2);
  const int64_t sparsity = indices.size(3);
  check_tensor(op, indices_name, indices, ScalarType::Short, {batch, heads, tokens, sparsity},
               indices);
  KV_CHECK(sparsity >= 1 && sparsity <= kMaxSparsity, op, indices_name,
           "of 1 to " + std::to_string(kMaxSparsity) + " atoms a vector", sparsity);
  const ScalarType dtype = coefficients.scalar_type();
  KV_CHECK(
      dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float,
      op, coefficients_name, "int8, float8_e4m3fn or float32", binding::format_dtype(dtype));
  check_tensor(op, coefficients_name, coefficients, dtype, {batch, heads, tokens, sparsity},
               indices);
  check_tensor(op, scale_name, scale, ScalarType::Half, {batch, heads, tokens}, indices);
  return dtype == ScalarType::Char    ? CoefficientType::kInt8
         : dtype == ScalarType::Float ? CoefficientType::kFloat32
                                      : CoefficientType::kE4M3;
}

void check_indices(const char* op, const char* argument, const Tensor& indices, int64_t atoms,
                   bool wanted) {
  const HostValues<int16_t> values(indices, wanted);
  if (!values.readable()) return;
  const int64_t count = indices.numel();
  // The largest as unsigned, so that negative ones count as large.
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t index = static_cast<uint16_t>(values[i]);
    largest = index > largest ? index : largest;
  }
  if (largest < atoms) return;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sparsity = indices.size(3), tokens = indices.size(2), heads = indices.size(1);
    KV_CHECK(values[i] >= 0 && values[i] < atoms, op,
             element_name(argument, {i / sparsity / tokens / heads, i / sparsity / tokens % heads,
                                     i / sparsity % tokens, i % sparsity}),
             "in [0, " + std::to_string(atoms) + ")", values[i]);
  }
}

}  // namespace kvcore::lexico
