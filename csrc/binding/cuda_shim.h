// What the CUDA libraries need of torch's CUDA runtime, without a CUDA build of torch to compile
// against. The symbols live in libtorch_cuda.so; weak, so that the library still loads, and
// explains itself, beside a CPU-only torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}

namespace kvcore::binding {

// The stream that torch.cuda.current_stream(device) names, a cudaStream_t.
inline void* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("kvcore: this torch is a build without CUDA");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace kvcore::binding
