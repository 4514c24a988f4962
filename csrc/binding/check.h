// Argument checks of op.cpp. Every message reads "<op>: <argument> must be <expected>, got
// <actual>"; the macros take the argument's name from the expression, so variables in op.cpp are
// called what the schema calls them. Failures are RuntimeError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace kvcore::binding {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size that KV_CHECK_SHAPE accepts whatever it is; printed as "*".
constexpr int64_t kAnySize = -1;

template <class Sizes>
std::string format_shape(const Sizes& sizes) {
  std::ostringstream out;
  const char* separator = "";
  out << '[';
  for (const int64_t size : sizes) {
    out << separator;
    if (size == kAnySize) {
      out << '*';
    } else {
      out << size;
    }
    separator = ", ";
  }
  out << ']';
  return out.str();
}

inline std::string format_shape(std::initializer_list<int64_t> sizes) {
  return format_shape<std::initializer_list<int64_t>>(sizes);
}

// A tensor argument can be None: torch passes it as an undefined tensor of shape [0].
inline std::string format_shape(const Tensor& tensor) {
  return tensor.defined() ? format_shape(tensor.sizes()) : "None";
}

// `name[i, j]`, for messages about one element.
inline std::string element_name(const char* name, std::initializer_list<int64_t> indices) {
  return name + format_shape(indices);
}

// The name that Python prints, without "torch.".
inline std::string format_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string format_device(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string type = tensor.is_cuda() ? "cuda" : "another device type";
  return type + ":" + std::to_string(tensor.get_device_index());
}

// The expression is the argument's name; optional tensors are passed dereferenced.
inline const char* argument_name(const char* expression) {
  return *expression == '*' ? expression + 1 : expression;
}

inline bool shape_matches(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  if (!tensor.defined() || tensor.dim() != static_cast<int64_t>(expected.size())) return false;
  int64_t i = 0;
  for (const int64_t size : expected) {
    if (size != kAnySize && tensor.size(i) != size) return false;
    ++i;
  }
  return true;
}

inline bool dtype_matches(const Tensor& tensor, std::initializer_list<ScalarType> accepted) {
  for (const ScalarType dtype : accepted) {
    if (tensor.scalar_type() == dtype) return true;
  }
  return false;
}

inline std::string format_dtypes(std::initializer_list<ScalarType> dtypes) {
  std::string text;
  size_t i = 0;
  for (const ScalarType dtype : dtypes) {
    text += (i == 0 ? "" : i + 1 == dtypes.size() ? " or " : ", ") + format_dtype(dtype);
    ++i;
  }
  return text;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

template <class T>
bool one_of(const T& value, std::initializer_list<T> accepted) {
  for (const T& choice : accepted) {
    if (value == choice) return true;
  }
  return false;
}

template <class T>
std::string format_list(std::initializer_list<T> values) {
  std::ostringstream out;
  const char* separator = "";
  for (const T& value : values) {
    out << separator << value;
    separator = ", ";
  }
  return out.str();
}

template <class Argument, class Expected, class Actual>
[[noreturn]] void fail_check(const char* op, const Argument& argument, const Expected& expected,
                             const Actual& actual) {
  std::ostringstream out;
  out << op << ": " << argument << " must be " << expected << ", got " << actual;
  throw std::runtime_error(out.str());
}

}  // namespace kvcore::binding

// The general form; argument, expected and actual are anything that a stream prints. They are
// evaluated only if the check fails. (STD_TORCH_CHECK would put function, file and line first.)
#define KV_CHECK(condition, op, argument, expected, actual)                          \
  do {                                                                               \
    if (!(condition)) ::kvcore::binding::fail_check(op, argument, expected, actual); \
  } while (false)

// Sizes after the tensor, kAnySize where any will do: KV_CHECK_SHAPE(kOp, k, batch, heads,
// kAnySize).
#define KV_CHECK_SHAPE(op, tensor, ...)                                                  \
  KV_CHECK(::kvcore::binding::shape_matches(tensor, {__VA_ARGS__}), op,                  \
           ::kvcore::binding::argument_name(#tensor),                                    \
           ::kvcore::binding::format_shape(std::initializer_list<int64_t>{__VA_ARGS__}), \
           ::kvcore::binding::format_shape(tensor))

#define KV_CHECK_DIM(op, tensor, expected)                                              \
  KV_CHECK((tensor).dim() == (expected), op, ::kvcore::binding::argument_name(#tensor), \
           std::to_string(expected) + "-dimensional", ::kvcore::binding::format_shape(tensor))

// Accepted dtypes after the tensor: KV_CHECK_DTYPE(kOp, q, ScalarType::Float, ScalarType::Half).
#define KV_CHECK_DTYPE(op, tensor, ...)                                 \
  KV_CHECK(::kvcore::binding::dtype_matches(tensor, {__VA_ARGS__}), op, \
           ::kvcore::binding::argument_name(#tensor),                   \
           ::kvcore::binding::format_dtypes({__VA_ARGS__}),             \
           ::kvcore::binding::format_dtype((tensor).scalar_type()))

#define KV_CHECK_SAME_DTYPE(op, tensor, other)                                 \
  KV_CHECK((tensor).scalar_type() == (other).scalar_type(), op,                \
           ::kvcore::binding::argument_name(#tensor),                          \
           ::kvcore::binding::format_dtype((other).scalar_type()) + " like " + \
               ::kvcore::binding::argument_name(#other),                       \
           ::kvcore::binding::format_dtype((tensor).scalar_type()))

#define KV_CHECK_SAME_DEVICE(op, tensor, other)                         \
  KV_CHECK(::kvcore::binding::same_device(tensor, other), op,           \
           ::kvcore::binding::argument_name(#tensor),                   \
           "on " + ::kvcore::binding::format_device(other) + " like " + \
               ::kvcore::binding::argument_name(#other),                \
           ::kvcore::binding::format_device(tensor))

#define KV_CHECK_CONTIGUOUS(op, tensor)                                                           \
  KV_CHECK((tensor).is_contiguous(), op, ::kvcore::binding::argument_name(#tensor), "contiguous", \
           "strides " + ::kvcore::binding::format_shape((tensor).strides()))

// A last dimension of 0 or 1 elements may have any stride.
#define KV_CHECK_LAST_CONTIGUOUS(op, tensor)                                                       \
  KV_CHECK((tensor).size((tensor).dim() - 1) <= 1 || (tensor).stride((tensor).dim() - 1) == 1, op, \
           ::kvcore::binding::argument_name(#tensor), "contiguous in its last dimension",          \
           "strides " + ::kvcore::binding::format_shape((tensor).strides()))

// Accepted values after the value: KV_CHECK_ONE_OF(kOp, bits, 2, 4, 8).
#define KV_CHECK_ONE_OF(op, value, ...)                                                         \
  KV_CHECK(                                                                                     \
      (::kvcore::binding::one_of<std::decay_t<decltype(value)>>(value, {__VA_ARGS__})), op,     \
      ::kvcore::binding::argument_name(#value),                                                 \
      "one of " + ::kvcore::binding::format_list<std::decay_t<decltype(value)>>({__VA_ARGS__}), \
      value)

// low <= value <= high.
#define KV_CHECK_RANGE(op, value, low, high)                                                    \
  KV_CHECK((value) >= (low) && (value) <= (high), op, ::kvcore::binding::argument_name(#value), \
           "in [" + ::kvcore::binding::format_list({(low), (high)}) + "]", value)
