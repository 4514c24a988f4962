// Rows of inputs as operands of products, and results as rows of outputs. For code that is compiled
// per ISA level.
#pragma once

#include <type_traits>

#include "core/cpu/gemm.h"
#include "core/cpu/rows.h"

namespace kvcore::KVCORE_ISA {

/// What the elements of an operand consist of.
template <class Operand>
using ValueOf = std::conditional_t<Operand::kPack == 1, float, BFloat16>;

/// Rounded up to whole blocks of a transposition: what lies beyond is not read again.
constexpr int whole_blocks(int size) { return (size + 15) / 16 * 16; }

/// Row (batch, head, token) of a view, as it is.
[[maybe_unused]] static void copy_row(const InputView& x, int64_t batch, int64_t head,
                                      int64_t token, int n, BFloat16* out) {
  const auto* const row = static_cast<const BFloat16*>(x.data) + batch * x.batch_stride +
                          head * x.head_stride + token * x.token_stride;
  if (x.channel_stride == 1) {
    memcpy(out, row, n * sizeof(BFloat16));
  } else {
    for (int i = 0; i < n; ++i) out[i] = row[i * x.channel_stride];
  }
}
inline void copy_row(const InputView& x, int64_t batch, int64_t head, int64_t token, int n,
                     float* out) {
  widen_row(x, batch, head, token, n, out);
}

/// n rows of a view from token `first`, then zeros up to `rows`.
template <class T>
inline void copy_rows(const InputView& x, int64_t batch, int64_t head, int64_t first, int n,
                      int rows, int dim, T* out, int64_t stride) {
  for (int i = 0; i < rows; ++i) {
    T* const row = out + i * stride;
    if (i < n) {
      copy_row(x, batch, head, first + i, dim, row);
    } else {
      memset(row, 0, dim * sizeof(T));
    }
  }
}

/// n values to an output; packed operands come with outputs of bf16.
template <class Operand>
inline void store_row(const float* row, int n, const OutputView& out, int64_t offset) {
  if constexpr (Operand::kPack == 2) {
    Operand::narrow(row, n, static_cast<BFloat16*>(out.data) + offset);
  } else {
    narrow_row(row, n, out, offset);
  }
}

}  // namespace kvcore::KVCORE_ISA
