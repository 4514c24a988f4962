// Models of the copies in core/cuda/copy.cuh. Between its start and the wait for its group, an
// asynchronous copy's destination holds poison, whatever the hardware would show there.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

#include "simt/scheduler.h"
#include "simt/types.h"

namespace kvcore {
namespace simt {

inline void check_aligned(const void* pointer, int bytes, const char* what,
                          const std::source_location& where) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) != 0) {
    fail(std::string(what) + " is not aligned to " + std::to_string(bytes) + " bytes", where);
  }
}

inline void check_shared(const void* pointer, int64_t bytes, const char* what,
                         const std::source_location& where) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  const int64_t size = static_cast<int64_t>(shared_memory_bytes());
  if (offset < 0 || offset + bytes > size) {
    fail(std::string(what) + " lies outside the " + std::to_string(size) +
             " bytes of shared memory, at offset " + std::to_string(offset),
         where);
  }
}

// One statement for the sanitizers to see: words, since all sizes are multiples of 4.
template <int kBytes>
inline void copy_words(void* to, const void* from) {
  for (int i = 0; i < kBytes / 4; ++i) {
    static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
  }
}

inline void land(const PendingCopy& copy) {
  for (int i = 0; i < copy.size / 4; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, copy.bytes + 4 * i, 4);
    static_cast<uint32_t*>(copy.smem)[i] = word;
  }
}

template <int kBytes>
inline void cp_async(void* smem, const void* gmem, bool valid, const std::source_location& where) {
  check_aligned(smem, kBytes, "cp.async: shared address", where);
  check_shared(smem, kBytes, "cp.async: shared address", where);
  alignas(16) unsigned char bytes[16] = {};
  if (valid) {
    check_aligned(gmem, kBytes, "cp.async: global address", where);
    copy_words<kBytes>(bytes, gmem);
  }
  PendingCopy copy{smem, {}, kBytes};
  __builtin_memcpy(copy.bytes, bytes, kBytes);
  begin_copy(copy, where);
  const uint32_t poison[4] = {~0u, ~0u, ~0u, ~0u};
  copy_words<kBytes>(smem, poison);
}

}  // namespace simt

inline void cp_async_16(void* smem, const void* gmem, bool valid = true,
                        std::source_location where = std::source_location::current()) {
  simt::cp_async<16>(smem, gmem, valid, where);
}
inline void cp_async_8(void* smem, const void* gmem, bool valid = true,
                       std::source_location where = std::source_location::current()) {
  simt::cp_async<8>(smem, gmem, valid, where);
}
inline void cp_async_4(void* smem, const void* gmem, bool valid = true,
                       std::source_location where = std::source_location::current()) {
  simt::cp_async<4>(smem, gmem, valid, where);
}
inline void cp_async_commit(std::source_location where = std::source_location::current()) {
  simt::commit_copies(where);
}
template <int kPending>
inline void cp_async_wait() {
  simt::wait_copies(kPending, &simt::land);
}

inline uint4 load_16(const void* address,
                     std::source_location where = std::source_location::current()) {
  simt::check_aligned(address, 16, "load_16: address", where);
  return *static_cast<const uint4*>(address);
}
inline uint4 load_streaming_16(const void* gmem,
                               std::source_location where = std::source_location::current()) {
  return load_16(gmem, where);
}
inline void store_16(void* address, uint4 value,
                     std::source_location where = std::source_location::current()) {
  simt::check_aligned(address, 16, "store_16: address", where);
  *static_cast<uint4*>(address) = value;
}

}  // namespace kvcore
