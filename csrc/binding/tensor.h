// From tensors to the plain pointers and strides of the params structs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <initializer_list>
#include <optional>

#include "binding/check.h"
#include "core/types.h"

namespace kvcore::binding {

// Unchecked: the dtype is KV_CHECK_DTYPE's business. T may be kvcore::Half, BFloat16 or void.
template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Null for an absent tensor.
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? mutable_data<T>(*tensor) : nullptr;
}

// The first N strides, in elements, into a plain array of a params struct.
template <size_t N>
void copy_strides(const Tensor& tensor, int64_t (&strides)[N]) {
  for (size_t i = 0; i < N; ++i) strides[i] = tensor.stride(static_cast<int64_t>(i));
}

// The params structs' dtype of a float type.
inline Dtype dtype_of(const char* op, const char* argument, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      KV_CHECK(false, op, argument, "float32, float16 or bfloat16", format_dtype(dtype));
  }
}
inline Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  return dtype_of(op, argument, tensor.scalar_type());
}

// Any strides, of a [batch, heads, tokens, channels] tensor that passed KV_CHECK_DIM(op, tensor,
// 4).
inline InputView input_view(const char* op, const char* argument, const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .dtype = dtype_of(op, argument, tensor),
          .batch_stride = tensor.stride(0),
          .head_stride = tensor.stride(1),
          .token_stride = tensor.stride(2),
          .channel_stride = tensor.stride(3)};
}

namespace detail {
// torch's own message names neither the op nor the output.
template <class F>
Tensor allocate(const char* op, const char* argument, const Tensor& like,
                IntHeaderOnlyArrayRef shape, ScalarType dtype, const F& f) {
  try {
    return f();
  } catch (const std::exception&) {
    fail_check(op, argument, "small enough for the memory of " + format_device(like),
               format_dtype(dtype) + " " + format_shape(shape));
  }
}
}  // namespace detail

// An output on the device of `like`, or on `device`; failing that, an error that names it.
inline Tensor new_output(const char* op, const char* argument, const Tensor& like,
                         IntHeaderOnlyArrayRef shape, ScalarType dtype,
                         std::optional<torch::stable::Device> device = std::nullopt) {
  return detail::allocate(op, argument, like, shape, dtype, [&] {
    return torch::stable::new_empty(like, shape, dtype, std::nullopt, device);
  });
}

inline Tensor new_zero_output(const char* op, const char* argument, const Tensor& like,
                              IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return detail::allocate(op, argument, like, shape, dtype,
                          [&] { return torch::stable::new_zeros(like, shape, dtype); });
}

// A contiguous output that the op allocated itself.
inline OutputView output_view(const char* op, const char* argument, const Tensor& tensor) {
  return {.data = tensor.mutable_data_ptr(), .dtype = dtype_of(op, argument, tensor)};
}

}  // namespace kvcore::binding
