// Binding ops to torch's dispatcher: what every family's register.cpp includes.
//
// One source serves three libraries: the build says which namespace of torch.ops and which
// dispatch key a library registers for (KVCORE_LIBRARY, KVCORE_DISPATCH_KEY in cmake/).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace kvcore::binding {

// Makes the device of a tensor current until the end of the scope: kernels are launched, and
// streams looked up, on the current device. Nothing to do on the CPU.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor* tensor) {
    if (tensor != nullptr && !tensor->is_cpu()) guard_.emplace(tensor->get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline const torch::stable::Tensor* tensor_of(const torch::stable::Tensor& tensor) {
  return tensor.defined() ? &tensor : nullptr;
}
inline const torch::stable::Tensor* tensor_of(const std::vector<torch::stable::Tensor>& tensors) {
  return tensors.empty() ? nullptr : tensor_of(tensors.front());
}
template <class T>
const torch::stable::Tensor* tensor_of(const T&) {
  return nullptr;
}

// The first tensor among the arguments; an op's tensors are all on one device, as it checks.
inline const torch::stable::Tensor* first_tensor() { return nullptr; }
template <class T, class... Rest>
const torch::stable::Tensor* first_tensor(const T& argument, const Rest&... rest) {
  const torch::stable::Tensor* tensor = tensor_of(argument);
  return tensor != nullptr ? tensor : first_tensor(rest...);
}

// The op, run on the device of its tensors.
template <auto kOp>
struct OnDevice;
template <class R, class... A, R (*kOp)(A...)>
struct OnDevice<kOp> {
  static R call(A... arguments) {
    const DeviceScope scope(first_tensor(arguments...));
    return kOp(arguments...);
  }
};

}  // namespace kvcore::binding

// The body of m.impl for an op: m.impl("turbo_decode", KVCORE_OP(kvcore::turbo::turbo_decode)).
#define KVCORE_OP(op) TORCH_BOX(&::kvcore::binding::OnDevice<&op>::call)
