// The check of cu_seqlens that kernels make where the host did not look.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore {

/// This thread's share of the question whether [num_seqs + 1] values rise from 0 to num_tokens; the
/// answer is yes if it is for all kThreads threads of a CTA.
template <int kThreads>
__device__ inline bool rises_to(const int32_t* cu_seqlens, int64_t num_seqs, int64_t num_tokens) {
  bool good = true;
  for (int64_t i = threadIdx.x; i <= num_seqs; i += kThreads) {
    const int32_t before = i == 0 ? 0 : cu_seqlens[i - 1];
    good = good && cu_seqlens[i] >= before && (i > 0 || cu_seqlens[i] == 0) &&
           (i < num_seqs || cu_seqlens[i] == num_tokens);
  }
  return good;
}

}  // namespace kvcore
