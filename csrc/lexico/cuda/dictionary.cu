#include "lexico/cuda/dictionary.h"

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"

namespace kvcore::lexico {

constexpr int kCopyThreads = 256;

__global__ void __launch_bounds__(kCopyThreads)
    copy_dictionary_kernel(const float* from, float* to, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (i < size) to[i] = from[i];
}

namespace {

bool is_aligned(const float* dictionary) {
  return reinterpret_cast<uintptr_t>(dictionary) % sizeof(uint4) == 0;
}

}  // namespace

AlignedDictionary::AlignedDictionary(const float* dictionary, int64_t atoms, int64_t head_dim)
    : copy_(is_aligned(dictionary) ? 0 : byte_count({atoms, head_dim, sizeof(float)})),
      data_(dictionary) {
  if (is_aligned(dictionary)) return;
  const int64_t size = atoms * head_dim;
  float* const copy = reinterpret_cast<float*>(copy_.data());
  launch(copy_dictionary_kernel, dim3(grid_of((size + kCopyThreads - 1) / kCopyThreads)),
         dim3(kCopyThreads), 0, current_stream(), dictionary, copy, size);
  data_ = copy;
}

}  // namespace kvcore::lexico
