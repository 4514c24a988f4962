// The seam between CUDA and the host build of the kernels: everything under csrc/*/cuda includes
// it first, and then is plain CUDA C++.
//
// Under nvcc this is the CUDA runtime. Under a host compiler it is csrc/simt, which runs the same
// source with a fiber for each CUDA thread. Rules that make both possible:
//   - Shared memory is dynamic only: dynamic_smem(), carved up by the kernel.
//   - Kernels are started by launch() and write PTX only through core/cuda.
//   - A block never waits for another one.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#elif defined(USE_CUDA)
#error "part of kvcore_cuda, but not compiled by nvcc: call the file .cu, or include less"
#else
#include "simt/simt.h"
#endif

#include <cstdint>

namespace kvcore {

/// Bytes of shared memory that a block may use on every architecture from sm_80 on (sm_86, sm_89
/// and sm_120 have the least).
constexpr int kPortableSmemBytes = 99 * 1024;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// The block's dynamic shared memory, aligned to 1024 bytes, as large as the launch asked for.
#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char kvcore_dynamic_smem[];
  return kvcore_dynamic_smem;
}
#else
inline unsigned char* dynamic_smem() { return simt::shared_memory(); }
#endif

}  // namespace kvcore
