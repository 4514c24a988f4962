// Working memory of the CPU backends.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

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

namespace detail {

inline int64_t scratch_bytes(int64_t size, std::initializer_list<int64_t> sizes) {
  int64_t bytes = size;
  for (const int64_t factor : sizes) {
    if (__builtin_mul_overflow(bytes, factor, &bytes)) {
      throw ScratchError(std::numeric_limits<int64_t>::max());
    }
  }
  return bytes;
}

// A cache line: a vector of 64 bytes that lies across two costs two reads.
constexpr std::align_val_t kScratchAlignment{64};
// What takes many pages takes huge ones where the system gives them: a fault for each of the small
// ones, and a miss of the TLB for each row, cost more than what is computed in them.
constexpr std::align_val_t kHugePage{2 << 20};
constexpr int64_t kHugeBytes = 8 << 20;

constexpr std::align_val_t scratch_alignment(int64_t bytes) {
  return bytes >= kHugeBytes ? kHugePage : kScratchAlignment;
}
struct AlignedDelete {
  std::align_val_t alignment = kScratchAlignment;
  void operator()(void* memory) const { ::operator delete(memory, alignment); }
};

}  // namespace detail

/// Memory for the product of `sizes` elements, not initialized. Throws ScratchError where there is
/// none, also if the bytes overflow: an expanded input has a size that no memory bounds, and a
/// product that wrapped around would be allocated and overrun.
template <class T>
std::unique_ptr<T[]> make_scratch(std::initializer_list<int64_t> sizes) {
  const int64_t bytes = detail::scratch_bytes(sizeof(T), sizes);
  T* memory = new (std::nothrow) T[static_cast<size_t>(bytes) / sizeof(T)];
  if (memory == nullptr) throw ScratchError(bytes);
  return std::unique_ptr<T[]>(memory);
}

/// The same, beginning at a cache line.
template <class T>
std::unique_ptr<T[], detail::AlignedDelete> make_aligned_scratch(
    std::initializer_list<int64_t> sizes) {
  static_assert(std::is_trivially_default_constructible_v<T> &&
                std::is_trivially_destructible_v<T>);
  const int64_t bytes = detail::scratch_bytes(sizeof(T), sizes);
  const std::align_val_t alignment = detail::scratch_alignment(bytes);
  void* memory = ::operator new(static_cast<size_t>(bytes), alignment, std::nothrow);
  if (memory == nullptr) throw ScratchError(bytes);
#if defined(__linux__)
  // Advice: what it returns changes nothing.
  if (bytes >= detail::kHugeBytes) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return std::unique_ptr<T[], detail::AlignedDelete>(static_cast<T*>(memory), {alignment});
}

}  // namespace kvcore
