#include "core/cuda/scratch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace kvcore {

using torch::stable::Tensor;

// A tensor of torch's caching allocator, which gives freed memory out again behind the kernels of
// its stream and knows about graph captures.
Scratch::Scratch(int64_t bytes) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                     torch::stable::accelerator::getCurrentDeviceIndex());
  auto tensor = std::make_unique<Tensor>(
      torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, device));
  data_ = static_cast<uint8_t*>(tensor->mutable_data_ptr());
  owner_ = tensor.release();
}

Scratch::~Scratch() { delete static_cast<Tensor*>(owner_); }

}  // namespace kvcore
