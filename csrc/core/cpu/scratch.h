// Working memory of the CPU backends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>

namespace kvcore {

/// A std::bad_alloc (MemoryError in Python) that says how much was wanted. Its text is in itself:
/// there may be no memory for another.
class ScratchError : public std::bad_alloc {
 public:
  explicit ScratchError(int64_t bytes) {
    snprintf(text_, sizeof text_, "no memory for %lld bytes of scratch",
             static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[64];
};

/// Memory for the product of `sizes` elements, not initialized. Throws ScratchError where there is
/// none, also if the bytes overflow: an expanded input has a size that no memory bounds, and a
/// product that wrapped around would be allocated and overrun.
template <class T>
std::unique_ptr<T[]> make_scratch(std::initializer_list<int64_t> sizes) {
  int64_t bytes = sizeof(T);
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      throw ScratchError(std::numeric_limits<int64_t>::max());
    }
  }
  T* memory = new (std::nothrow) T[static_cast<size_t>(bytes) / sizeof(T)];
  if (memory == nullptr) throw ScratchError(bytes);
  return std::unique_ptr<T[]>(memory);
}

}  // namespace kvcore
