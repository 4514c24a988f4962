// Working memory of the CPU backends.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>

namespace kvcore {

/// Memory for the product of `sizes` elements, not initialized. Throws std::bad_alloc (MemoryError
/// in Python) where there is none, also if the product overflows: an expanded input has a size
/// that no memory bounds, and a product that wrapped around would be allocated and overrun.
template <class T>
std::unique_ptr<T[]> make_scratch(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(count, size, &count)) throw std::bad_alloc();
  }
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

}  // namespace kvcore
