// Sizes of launches and of their scratch memory, from sizes of tensors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

namespace kvcore {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks of a one-dimensional grid. Throws where CUDA's limit would cut the number off.
inline unsigned grid_of(int64_t ctas) {
  if (ctas > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("a kernel takes at most 2147483647 thread blocks, got " +
                             std::to_string(ctas) + ": split the call");
  }
  return static_cast<unsigned>(ctas);
}

/// The product; throws std::bad_alloc if there can be no such memory. An expanded input has a size
/// that no memory bounds.
inline int64_t byte_count(std::initializer_list<int64_t> factors) {
  int64_t bytes = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(bytes, factor, &bytes)) throw std::bad_alloc();
  }
  return bytes;
}

/// Throws if memory that a kernel accesses in units of 16 bytes does not begin at one.
inline void check_aligned_16(const void* data, const std::string& name) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(data) % 16;
  if (past == 0) return;
  throw std::runtime_error(name + " must begin at a multiple of 16 bytes, got an address " +
                           std::to_string(past) + " bytes past one");
}

}  // namespace kvcore
