// Encoding and reconstruction: check arguments, allocate outputs, fill params, call the backend.
#include <cmath>

#include "lexico/op.h"

namespace kvcore::lexico {
namespace {

using binding::data;
using binding::mutable_data;
using binding::new_output;

CoefficientType check_coefficient_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char:
      return CoefficientType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return CoefficientType::kE4M3;
    case ScalarType::Float:
      return CoefficientType::kFloat32;
    default:
      KV_CHECK(false, op, "dtype", "int8, float8_e4m3fn or float32", binding::format_dtype(dtype));
  }
}

/// Rows of norm 1; NaN is none.
void check_unit_norm(const char* op, const char* argument, const Tensor& dictionary, bool wanted) {
  const HostValues<float> values(dictionary, wanted);
  if (!values.readable()) return;
  const int64_t atoms = dictionary.size(0), head_dim = dictionary.size(1);
  constexpr int kSums = 8;  // head_dim is a multiple of it; the compiler makes vectors of them
  for (int64_t n = 0; n < atoms; ++n) {
    const float* atom = values.data() + n * head_dim;
    float sums[kSums] = {};
    for (int64_t i = 0; i < head_dim; i += kSums) {
      for (int lane = 0; lane < kSums; ++lane) sums[lane] += atom[i + lane] * atom[i + lane];
    }
    double squared = 0;
    for (const float sum : sums) squared += sum;
    const double norm = std::sqrt(squared);
    KV_CHECK(std::abs(norm - 1) <= kNormTolerance, op, element_name(argument, {n}),
             "an atom of norm 1", norm);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> lexico_encode(const Tensor& x, const Tensor& dictionary,
                                                         const std::optional<Tensor>& gram,
                                                         int64_t sparsity, double tolerance,
                                                         ScalarType dtype, bool check_values) {
  constexpr const char* kOp = "lexico_encode";
  check_input(kOp, "x", x);
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
  const int64_t atoms = check_dictionary(kOp, "dictionary", dictionary, head_dim, x);
  if (gram) check_tensor(kOp, "gram", *gram, ScalarType::Float, {atoms, atoms}, x);
  const int64_t max_sparsity = std::min({atoms, head_dim, int64_t{kMaxSparsity}});
  KV_CHECK_RANGE(kOp, sparsity, int64_t{1}, max_sparsity);
  // Negated, so that NaN is rejected.
  KV_CHECK(tolerance >= 0 && tolerance < 1, kOp, "tolerance", "in [0, 1)", tolerance);
  const CoefficientType type = check_coefficient_type(kOp, dtype);
  check_unit_norm(kOp, "dictionary", dictionary, check_values);

  const Tensor indices =
      new_output(kOp, "indices", x, {batch, heads, tokens, sparsity}, ScalarType::Short);
  const Tensor coefficients =
      new_output(kOp, "coefficients", x, {batch, heads, tokens, sparsity}, dtype);
  const Tensor scale = new_output(kOp, "scale", x, {batch, heads, tokens}, ScalarType::Half);
  const Tensor residual = new_output(kOp, "residual", x, {batch, heads, tokens}, ScalarType::Float);
  if (residual.numel() > 0) {
    backend::encode({.x = binding::input_view(kOp, "x", x),
                     .dictionary = data<float>(dictionary),
                     .gram = data<float>(gram),
                     .batch = batch,
                     .heads = heads,
                     .tokens = tokens,
                     .head_dim = head_dim,
                     .atoms = atoms,
                     .sparsity = sparsity,
                     .tolerance = static_cast<float>(tolerance),
                     .dtype = type,
                     .indices = mutable_data<int16_t>(indices),
                     .coefficients = mutable_data<void>(coefficients),
                     .scale = mutable_data<uint16_t>(scale),
                     .residual = mutable_data<float>(residual)});
  }
  return {indices, coefficients, scale, residual};
}

Tensor lexico_reconstruct(const Tensor& indices, const Tensor& coefficients, const Tensor& scale,
                          const Tensor& dictionary, ScalarType dtype, bool check_values) {
  constexpr const char* kOp = "lexico_reconstruct";
  const CoefficientType type =
      check_codes(kOp, "indices", indices, "coefficients", coefficients, "scale", scale);
  KV_CHECK_DIM(kOp, dictionary, 2);
  const int64_t head_dim = dictionary.size(1);
  KV_CHECK_ONE_OF(kOp, head_dim, 64, 96, 128, 256);
  const int64_t atoms = check_dictionary(kOp, "dictionary", dictionary, head_dim, indices);
  binding::dtype_of(kOp, "dtype", dtype);
  check_indices(kOp, "indices", indices, atoms, check_values);
  const int64_t batch = indices.size(0), heads = indices.size(1), tokens = indices.size(2);
  const Tensor out = new_output(kOp, "out", indices, {batch, heads, tokens, head_dim}, dtype);
  if (out.numel() > 0) {
    backend::reconstruct({.indices = data<int16_t>(indices),
                          .coefficients = data<void>(coefficients),
                          .coefficient_type = type,
                          .scale = data<uint16_t>(scale),
                          .dictionary = data<float>(dictionary),
                          .batch = batch,
                          .heads = heads,
                          .tokens = tokens,
                          .head_dim = head_dim,
                          .atoms = atoms,
                          .sparsity = indices.size(3),
                          .out = binding::output_view(kOp, "out", out)});
  }
  return out;
}

}  // namespace kvcore::lexico
