// Dictionaries as kernels read them, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "core/cuda/scratch.h"

namespace kvcore::lexico {

/// A dictionary at an address aligned to 16 bytes: a tensor may begin anywhere, and then it is
/// copied, which costs a launch.
class AlignedDictionary {
 public:
  AlignedDictionary(const float* dictionary, int64_t atoms, int64_t head_dim);
  const float* data() const { return data_; }

 private:
  Scratch copy_;
  const float* data_;
};

}  // namespace kvcore::lexico
