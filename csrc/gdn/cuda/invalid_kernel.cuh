// What becomes of a call whose cu_seqlens are not what they must be: the kernels leave it alone,
// and all of its outputs are NaN.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/scratch.h"
#include "gdn/cuda/sequences.cuh"

namespace kvcore::gdn {

constexpr int kCheckThreads = 256;

/// An output and its number of elements.
struct Poisoned {
  OutputView out;
  int64_t count;

  Poisoned(void* data, Dtype dtype, int64_t count) : out{data, dtype}, count(count) {}
};

template <int kThreads>
__global__ void poison_kernel(OutputView out, int64_t count, const int32_t* is_valid) {
  if (*is_valid != 0) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    store_element(out, i, __int_as_float(0x7fc00000));
  }
}

/// The check of a call's cu_seqlens, if it has any, on the device.
class SequenceCheck {
 public:
  /// Lets the table know of the result.
  explicit SequenceCheck(SequenceTable& table) {
    if (table.sequences.cu_seqlens == nullptr) return;
    memory_.emplace(int64_t{sizeof(int32_t)});
    is_valid_ = reinterpret_cast<int32_t*>(memory_->data());
    launch(check_sequences_kernel<kCheckThreads>, 1, kCheckThreads, 0, current_stream(),
           table.sequences, table.num_tokens, is_valid_, error_flags());
    table.is_valid = is_valid_;
  }

  /// Launched last.
  void poison(std::initializer_list<Poisoned> outputs) const {
    if (is_valid_ == nullptr) return;
    constexpr int64_t kMaxCtas = 1024;  // most calls are valid: a few CTAs that return at once
    for (const auto& [out, count] : outputs) {
      if (count == 0) continue;
      const int64_t ctas = std::min(kMaxCtas, ceil_div(count, kCheckThreads));
      launch(poison_kernel<kCheckThreads>, grid_of(ctas), kCheckThreads, 0, current_stream(), out,
             count, is_valid_);
    }
  }

 private:
  std::optional<Scratch> memory_;
  int32_t* is_valid_ = nullptr;
};

}  // namespace kvcore::gdn
