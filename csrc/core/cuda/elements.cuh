// Single elements of float tensors whose type is known at run time only: where speed does not
// depend on them.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/view.h"

namespace kvcore {

/// The element at an offset in elements.
__device__ inline float load_element(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat16:
      return to_float(static_cast<const Half*>(data)[at]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}
__device__ inline float load_element(const InputView& x, int64_t at) {
  return load_element(x.data, x.dtype, at);
}

/// Rounded to nearest even.
__device__ inline void store_element(const OutputView& out, int64_t at, float x) {
  switch (out.dtype) {
    case Dtype::kFloat16:
      static_cast<Half*>(out.data)[at] = from_float<Half>(x);
      return;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(out.data)[at] = from_float<BFloat16>(x);
      return;
    default:
      static_cast<float*>(out.data)[at] = x;
  }
}

}  // namespace kvcore
