// Operands of products between tokens, channels and states: fp32 as they lie, or pairs of bf16. For
// code that is compiled per ISA level.
#pragma once

#include "core/cpu/operands.h"
#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {

/// How Rows, Squares and Talls hold operands. A first operand (A of A B) has the inner index along
/// its rows, a second one (B) across them, packed operands two inner indices in an element.
template <class Operand>
struct Layout {
  using Element = typename Operand::Element;
  using Value = ValueOf<Operand>;
  static constexpr int kRow = kRowStride / Operand::kPack;        // of a first operand in Rows
  static constexpr int kSquare = kSquareStride / Operand::kPack;  // of one in a Square
  static Element* of(float* memory) { return reinterpret_cast<Element*>(memory); }
  static Value* values(float* memory) { return reinterpret_cast<Value*>(memory); }
};

/// n rows of a view from token `first`, then zeros up to `rows`.
template <class T>
inline void load_rows(const InputView& x, int64_t batch, int64_t head, int64_t first, int n,
                      int rows, int dim, T* out) {
  copy_rows(x, batch, head, first, n, rows, dim, out, kRowStride);
}

/// First operand from rows of fp32: themselves, or rounded ones in `memory` with the same stride.
template <class Operand>
inline auto* first_operand(float* x, int64_t stride, int rows, int dim, float* memory) {
  using L = Layout<Operand>;
  if constexpr (Operand::kPack == 2) {
    for (int i = 0; i < rows; ++i) {
      Operand::narrow(x + i * stride, dim, L::values(memory) + i * stride);
    }
    return L::of(memory);
  } else {
    return x;
  }
}

/// Second operand whose inner index is that of the rows, each times its factor; in `memory`.
template <class Operand>
inline auto* second_operand(const float* x, int rows, int dim, const float* factors,
                            float* memory) {
  using L = Layout<Operand>;
  for (int i = 0; i < rows; i += Operand::kPack) {
    const float* const row = x + i * kRowStride;
    if constexpr (Operand::kPack == 2) {
      Operand::pack(row, row + kRowStride, factors[i], factors[i + 1], dim,
                    L::of(memory) + i / 2 * kRowStride);
    } else {
      scale_row(row, factors[i], dim, memory + i * kRowStride);
    }
  }
  return L::of(memory);
}

/// The same from rows as they were given: themselves, or pairs of them in `memory`.
template <class Operand>
inline auto* second_operand(float* rows_as_given, int rows, int dim, float* memory) {
  using L = Layout<Operand>;
  if constexpr (Operand::kPack == 2) {
    const BFloat16* const values = L::values(rows_as_given);
    for (int i = 0; i < rows; i += 2) {
      Operand::pack(values + i * kRowStride, values + (i + 1) * kRowStride, dim,
                    L::of(memory) + i / 2 * kRowStride);
    }
    return L::of(memory);
  } else {
    return rows_as_given;
  }
}

/// A state as second operand, its inner index that of the keys' channels.
template <class Operand>
inline auto* state_operand(float* state, int k_dim, int columns, int stride, float* memory) {
  using L = Layout<Operand>;
  if constexpr (Operand::kPack == 2) {
    for (int i = 0; i < k_dim; i += 2) {
      Operand::pack(state + i * stride, state + (i + 1) * stride, 1.0f, 1.0f, columns,
                    L::of(memory) + i / 2 * stride);
    }
    return L::of(memory);
  } else {
    return state;
  }
}

/// Second operand x^T from a first operand x [rows, dim]: its inner index is that of x's columns.
template <class Operand>
inline auto* transposed_operand(const typename Operand::Element* x, int64_t x_stride, int rows,
                                int dim, float* memory, int64_t stride) {
  auto* const out = Layout<Operand>::of(memory);
  transpose(x, x_stride, rows, whole_blocks(dim / Operand::kPack), out, stride);
  return out;
}

/// First operand x^T [dim, rows] from a second operand x whose inner index is that of the rows.
template <class Operand>
inline auto* by_channel(const typename Operand::Element* x, int rows, int dim, float* memory) {
  auto* const out = Layout<Operand>::of(memory);
  transpose(x, kRowStride, whole_blocks(rows / Operand::kPack), dim, out, kSquareStride);
  return out;
}

}  // namespace kvcore::gdn::KVCORE_ISA
