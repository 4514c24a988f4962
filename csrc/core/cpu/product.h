// What a product of small matrices is asked for, however it is computed (gemm.h). For code that is
// compiled per level.
#pragma once

#include "core/cpu/vec.h"

namespace kvcore::KVCORE_ISA {

// Sizes of C are multiples of this; so is an inner size, if the operands are packed.
constexpr int kProductMultiple = 16;

/// What of a product is zero or not wanted.
enum class Part {
  kAll,
  kLowerA,  // A is zero above its diagonal
  kUpperA,  // A is zero below its diagonal
  kLowerC,  // of C only what lies on or below the diagonal is wanted
};

/// Inner indices that matter to rows [begin_row, end_row).
struct Range {
  int begin, end;
};
inline Range inner_range(Part part, int begin_row, int end_row, int inner) {
  return {part == Part::kUpperA ? begin_row : 0,
          part == Part::kLowerA && end_row < inner ? end_row : inner};
}

/// What a product is added to: row i of C times scale[i * stride], nothing if scale is null.
struct Onto {
  const float* scale = nullptr;
  int stride = 1;

  Onto from_row(int row) const { return {scale ? scale + row * stride : nullptr, stride}; }
};
constexpr float kOne = 1.0f;
constexpr Onto kOntoC = {&kOne, 0};

}  // namespace kvcore::KVCORE_ISA
