// Rows of strided views to fp32 and back. For code that is compiled per ISA level.
#pragma once

#include "core/cpu/vec.h"
#include "core/view.h"

namespace kvcore::KVCORE_ISA {

/// Widens n elements that lie stride apart.
template <class T>
inline void widen_row(const T* x, int64_t stride, int n, float* out) {
  int i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  }
  for (; i < n; ++i) out[i] = widen(x[i * stride]);
}

/// Row (batch, head, token) of a view, n channels.
inline void widen_row(const InputView& view, int64_t batch, int64_t head, int64_t token, int n,
                      float* out) {
  const int64_t offset =
      batch * view.batch_stride + head * view.head_stride + token * view.token_stride;
  switch (view.dtype) {
    case Dtype::kFloat16:
      return widen_row(static_cast<const Half*>(view.data) + offset, view.channel_stride, n, out);
    case Dtype::kBFloat16:
      return widen_row(static_cast<const BFloat16*>(view.data) + offset, view.channel_stride, n,
                       out);
    default:
      return widen_row(static_cast<const float*>(view.data) + offset, view.channel_stride, n, out);
  }
}

template <class T>
inline void narrow_row(const float* x, int n, T* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) narrow(x[i], out + i);
}

/// Writes n values, rounding to nearest even, at an element offset of a contiguous output.
inline void narrow_row(const float* x, int n, const OutputView& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::kFloat16:
      return narrow_row(x, n, static_cast<Half*>(view.data) + offset);
    case Dtype::kBFloat16:
      return narrow_row(x, n, static_cast<BFloat16*>(view.data) + offset);
    default:
      return narrow_row(x, n, static_cast<float*>(view.data) + offset);
  }
}

}  // namespace kvcore::KVCORE_ISA
