// A strided read-only view of a float tensor, free of Torch: what kernels see of an input.
#pragma once

#include <cstdint>

namespace kvcore {

enum class Dtype : int8_t { kFloat32, kFloat16, kBFloat16 };

/// Strides are in elements and may be zero (expanded) or anything else a tensor can have.
struct InputView {
  const void* data;
  Dtype dtype;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t channel_stride;
};

/// A contiguous [batch, heads, tokens, head_dim] output of the same float types.
struct OutputView {
  void* data;
  Dtype dtype;
};

}  // namespace kvcore
