// Ops whose kernels are not there yet: each definition elsewhere takes the place of the one here.
#include <stdexcept>
#include <string>

#include "turbo/params.h"

namespace kvcore::turbo::backend {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(std::string(op) + ": has no CUDA kernel yet");
}

}  // namespace

[[gnu::weak]] void attention(const AttentionParams&) { refuse("turbo_attention"); }
[[gnu::weak]] void decode(const DecodeParams&) { refuse("turbo_decode"); }

}  // namespace kvcore::turbo::backend
