// Checks that the ops of the family share. Every one throws before anything is written.
#include "lexico/op.h"

namespace kvcore::lexico {

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
  KV_CHECK(binding::shape_matches(coefficients, {batch, heads, tokens, sparsity}), op,
           coefficients_name, binding::format_shape({batch, heads, tokens, sparsity}),
           binding::format_shape(coefficients));
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

int64_t check_tail(const char* op, const char* argument, const Tensor& tail, int64_t batch,
                   int64_t kv_heads, int64_t tiles, const Tensor& like) {
  const bool is_tail = tail.dim() == 4 && tile_width(tail.size(3)) != 0;
  KV_CHECK(is_tail, op, argument,
           "[batch, kv_heads, tiles, bytes] with bytes 64 + 96 * sparsity, sparsity 1 to " +
               std::to_string(kMaxSparsity),
           binding::format_shape(tail));
  check_tensor(op, argument, tail, ScalarType::Byte, {batch, kv_heads, tiles, tail.size(3)}, like);
  return tile_width(tail.size(3));
}

Block check_block(const char* op, const std::string& argument, const Tensor& block, int64_t batch,
                  int64_t kv_heads, int64_t min_bytes, const Tensor& like) {
  check_tensor(op, argument.c_str(), block, ScalarType::Byte, {batch, kv_heads, binding::kAnySize},
               like);
  const int64_t bytes = block.size(2);
  KV_CHECK(bytes >= min_bytes && bytes % kBlockAlignment == 0, op, argument,
           "of a multiple of " + std::to_string(kBlockAlignment) + " bytes a head, at least " +
               std::to_string(min_bytes),
           bytes);
  return {.data = binding::data<uint8_t>(block), .bytes = bytes};
}

}  // namespace kvcore::lexico
