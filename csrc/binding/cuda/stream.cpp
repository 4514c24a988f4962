#include "core/cuda/stream.h"

#include <torch/csrc/stable/accelerator.h>

#include "binding/cuda_shim.h"

namespace kvcore {

void* current_stream_handle() {
  return binding::current_stream(torch::stable::accelerator::getCurrentDeviceIndex());
}

}  // namespace kvcore
