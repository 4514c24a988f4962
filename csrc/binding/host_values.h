// The values of a tensor, for checks on the host.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "binding/tensor.h"
#include "core/error_flags.h"

namespace kvcore::binding {

/// The values of a contiguous tensor of T, where they can or must be read on the host.
template <class T = int32_t>
class HostValues {
 public:
  /// None at all: readable() is false.
  HostValues() = default;

  /// Copies and synchronises when the backend's values cannot be read in place and `wanted`.
  HostValues(const Tensor& tensor, bool wanted) {
    if (kHostReadsValues) {
      values_ = binding::data<T>(tensor);
      readable_ = true;
    } else if (wanted) {
      copy_ = torch::stable::to(tensor, torch::stable::Device("cpu"));
      values_ = binding::data<T>(*copy_);
      readable_ = true;
    }
  }

  bool readable() const { return readable_; }
  T operator[](int64_t i) const { return values_[i]; }
  const T* data() const { return values_; }

 private:
  std::optional<Tensor> copy_;
  const T* values_ = nullptr;  // null for a tensor without elements too
  bool readable_ = false;
};

}  // namespace kvcore::binding
