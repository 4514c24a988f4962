#include "core/cuda/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace kvcore {

// Exactly as large as asked for, so that AddressSanitizer knows its end, and full of NaN and -1, so
// that memory which no kernel wrote shows in results.
Scratch::Scratch(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes);
  if (posix_memalign(&owner_, 256, size) != 0) throw std::bad_alloc();
  std::memset(owner_, 0xff, size);
  data_ = static_cast<uint8_t*>(owner_);
}

Scratch::~Scratch() { std::free(owner_); }

}  // namespace kvcore
