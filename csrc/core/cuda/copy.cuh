// Copies between global and shared memory, 16 bytes at a time.
//
//   cp_async_16(smem, gmem, valid)   starts a copy of 16 bytes, around the L1 cache; zeros if not
//   cp_async_8, cp_async_4           valid, and then gmem is not read. Smaller ones go through L1
//   cp_async_commit()                ends a group of copies of this thread
//   cp_async_wait<N>()               until all groups of this thread but the N newest have landed;
//                                    other threads see them after a barrier that follows
//   load_16, store_16                uint4 of any memory
//   load_streaming_16                of global memory that the kernel does not write, read once:
//                                    does not displace what L1 holds
//
// All addresses are aligned to the size.
#pragma once

#include "core/cuda/device.cuh"

#ifdef __CUDACC__
namespace kvcore {

/// Shared-memory addresses are 32 bits in PTX.
__device__ __forceinline__ uint32_t smem_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_8(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_16(const void* address) {
  return *static_cast<const uint4*>(address);
}
__device__ __forceinline__ uint4 load_streaming_16(const void* gmem) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(gmem)));
  return x;
}
__device__ __forceinline__ void store_16(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

}  // namespace kvcore
#else
#include "simt/copy.h"
#endif
