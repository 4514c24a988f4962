// Element types as C++ types. Storage only: code that converts them is compiled per ISA and lives
// with the kernels.
#pragma once

#include <cstdint>

#include "core/view.h"

namespace kvcore {

struct Half {
  uint16_t bits;  // IEEE 754 binary16
};

struct BFloat16 {
  uint16_t bits;  // the upper half of an IEEE 754 binary32
};

static_assert(sizeof(Half) == 2 && sizeof(BFloat16) == 2);

/// The Dtype of a C++ type and its name in Python, without "torch.".
template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
  static constexpr const char* name = "float32";
};
template <>
struct DtypeOf<Half> {
  static constexpr Dtype value = Dtype::kFloat16;
  static constexpr const char* name = "float16";
};
template <>
struct DtypeOf<BFloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
  static constexpr const char* name = "bfloat16";
};

}  // namespace kvcore
