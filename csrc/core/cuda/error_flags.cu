#include "core/cuda/error_flags.cuh"

#include "core/cuda/launch.cuh"

namespace kvcore {
namespace {

__device__ uint32_t flags_word;

}  // namespace

// In the SIMT build too, although it could.
const bool kHostReadsValues = false;

#ifdef __CUDACC__

uint32_t* error_flags() {
  void* address = nullptr;
  detail::check_cuda(cudaGetSymbolAddress(&address, flags_word), "cudaGetSymbolAddress");
  return static_cast<uint32_t*>(address);
}

uint32_t take_error_flags() {
  // Torch's streams do not wait for the copies' stream, nor it for them.
  detail::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  uint32_t flags = 0;
  detail::check_cuda(cudaMemcpyFromSymbol(&flags, flags_word, sizeof flags),
                     "cudaMemcpyFromSymbol");
  if (flags != 0) {
    const uint32_t none = 0;
    detail::check_cuda(cudaMemcpyToSymbol(flags_word, &none, sizeof none), "cudaMemcpyToSymbol");
  }
  return flags;
}

#else

uint32_t* error_flags() { return &flags_word; }

uint32_t take_error_flags() { return atomicExch(&flags_word, 0u); }

#endif

}  // namespace kvcore
