// Shared memory of one block, and who wrote beyond it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "simt/sanitizer.h"

namespace kvcore::simt {

/// A block's dynamic shared memory: every byte `poison` at first, between guards of a known
/// pattern.
class SharedMemory {
 public:
  SharedMemory(size_t bytes, unsigned char poison) : bytes_(bytes) {
    // Aligned as dynamic_smem() promises.
    all_ = static_cast<unsigned char*>(std::aligned_alloc(1024, allocated()));
    if (all_ == nullptr) throw std::bad_alloc();
    std::memset(all_, kGuard, allocated());
    std::memset(data(), poison, bytes);
#if KVCORE_SIMT_ASAN
    __asan_poison_memory_region(all_, allocated());
    __asan_unpoison_memory_region(data(), bytes);
#endif
  }
  ~SharedMemory() {
#if KVCORE_SIMT_ASAN
    __asan_unpoison_memory_region(all_, allocated());
#endif
    std::free(all_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* data() const { return all_ + kGuardBytes; }

  /// Empty if the guards are as they were.
  std::string damage() const {
    for (size_t i = 0; i < allocated(); ++i) {
      if (i == kGuardBytes) i += bytes_;
      if (i >= allocated() || all_[i] == kGuard) continue;
      const int64_t offset = static_cast<int64_t>(i) - static_cast<int64_t>(kGuardBytes);
      return "wrote outside its " + std::to_string(bytes_) + " bytes of shared memory, at offset " +
             std::to_string(offset);
    }
    return "";
  }

 private:
  static constexpr size_t kGuardBytes = 1024;
  static constexpr unsigned char kGuard = 0xa5;
  size_t allocated() const { return (bytes_ + 2 * kGuardBytes + 1023) / 1024 * 1024; }
  unsigned char* all_;
  size_t bytes_;
};

}  // namespace kvcore::simt
