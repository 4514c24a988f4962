// Rows of strided float tensors, for kernels: any strides, four channels at a time.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/elements.cuh"
#include "core/types.h"
#include "core/view.h"

namespace kvcore {

/// An InputView, and whether four channels can be loaded as one.
struct DeviceRows {
  const void* data;
  int64_t batch_stride, head_stride, token_stride, channel_stride;
  Dtype dtype;
  bool vectorized;

  __device__ int64_t head(int64_t batch_idx, int64_t head_idx) const {
    return batch_idx * batch_stride + head_idx * head_stride;
  }
};

inline DeviceRows device_rows(const InputView& x) {
  const int64_t bytes = x.dtype == Dtype::kFloat32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % (4 * bytes) == 0 &&
                       x.batch_stride % 4 == 0 && x.head_stride % 4 == 0 && x.token_stride % 4 == 0;
  return {.data = x.data,
          .batch_stride = x.batch_stride,
          .head_stride = x.head_stride,
          .token_stride = x.token_stride,
          .channel_stride = x.channel_stride,
          .dtype = x.dtype,
          .vectorized = x.channel_stride == 1 && aligned};
}

/// Channels [channel, channel + 4) of the row at an element offset; channel is a multiple of 4.
template <class T>
__device__ inline void load_channels(const DeviceRows& rows, int64_t offset, int channel,
                                     float (&out)[4]) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  };
  const T* row = static_cast<const T*>(rows.data) + offset;
  if (rows.vectorized) {
    const Four four = *reinterpret_cast<const Four*>(row + channel);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = to_float(four.x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = to_float(row[(channel + j) * rows.channel_stride]);
  }
}

/// One channel of such a row, of any type: where speed does not matter.
__device__ inline float load_channel(const DeviceRows& rows, int64_t offset, int channel) {
  return load_element(rows.data, rows.dtype, offset + channel * rows.channel_stride);
}

/// Four channels to a row of a contiguous output, rounded to nearest even.
template <class T>
__device__ inline void store_channels(T* row, int channel, const float (&in)[4]) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  };
  Four four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four.x[j] = from_float<T>(in[j]);
  *reinterpret_cast<Four*>(row + channel) = four;
}

}  // namespace kvcore
