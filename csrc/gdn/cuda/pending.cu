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

[[gnu::weak]] void chunk_scan(const ChunkScanParams&) { refuse("gdn_chunk_scan"); }
[[gnu::weak]] void chunk_scan_backward(const ChunkScanBackwardParams&) {
  refuse("gdn_chunk_scan_backward");
}
[[gnu::weak]] void recurrent_step(const RecurrentStepParams&) { refuse("gdn_recurrent_step"); }
[[gnu::weak]] void conv1d(const Conv1DParams&) { refuse("gdn_conv1d"); }
[[gnu::weak]] void conv1d_backward(const Conv1DBackwardParams&) { refuse("gdn_conv1d_backward"); }
[[gnu::weak]] void conv1d_update(const Conv1DUpdateParams&) { refuse("gdn_conv1d_update"); }

}  // namespace kvcore::gdn::backend
