// Ops whose kernels are not there yet: each definition elsewhere takes the place of the one here.
#include <stdexcept>
#include <string>

#include "gdn/params.h"

namespace kvcore::gdn::backend {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(std::string(op) + ": has no CUDA kernel yet");
}

}  // namespace

[[gnu::weak]] void chunk_scan_backward(const ChunkScanBackwardParams&) {
  refuse("gdn_chunk_scan_backward");
}

}  // namespace kvcore::gdn::backend
