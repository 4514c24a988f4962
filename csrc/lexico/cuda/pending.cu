// Ops whose kernels are not there yet: each definition elsewhere takes the place of the one here.
#include <stdexcept>
#include <string>

#include "lexico/params.h"

namespace kvcore::lexico::backend {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(std::string(op) + ": has no CUDA kernel yet");
}

}  // namespace

[[gnu::weak]] void encode(const EncodeParams&) { refuse("lexico_encode"); }
[[gnu::weak]] void reconstruct(const ReconstructParams&) { refuse("lexico_reconstruct"); }
[[gnu::weak]] void attention(const AttentionParams&) { refuse("lexico_attention"); }

}  // namespace kvcore::lexico::backend
