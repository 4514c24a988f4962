// Tiles of queries and blocks of keys as operands of products. For code that is compiled per ISA
// level.
#pragma once

#include <math.h>

#include "core/cpu/operands.h"
#include "dense/cpu/attention.h"

namespace kvcore::dense::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kQueryStride = padded(kQueries), kKeyStride = padded(kKeys);

/// Strides of a head_dim up to kDim. A first operand (A of A B) has the inner index along its rows,
/// a second one (B) across them, packed operands two inner indices in an element.
template <class OperandOf, int kDim>
struct Layout {
  using Operand = OperandOf;
  using Element = typename Operand::Element;
  using Value = ValueOf<Operand>;
  static constexpr int kPack = Operand::kPack;
  static constexpr int kMaxDim = kDim;
  static constexpr int kDimStride = padded(kDim);  // in values, or in elements of a second operand
  static constexpr int kDimFirst = kDimStride / kPack;      // in elements of a first operand
  static constexpr int kKeyFirst = kKeyStride / kPack;      // likewise
  static constexpr int kQueryFirst = kQueryStride / kPack;  // likewise
  // Where the parts of block_floats and tile_floats begin: they are sized for fp32.
  static constexpr int kByChannelOfKeys = kKeys * kDimStride;
  static constexpr int kFlagsOfKeys = kByChannelOfKeys + kDim * kKeyStride;
  static constexpr int kByRowOfQueries = kDim * kQueryStride;
  static constexpr int kFlagsOfQueries = kByRowOfQueries + kQueries * kDimStride;

  static Element* of(float* memory) { return reinterpret_cast<Element*>(memory); }
  static const Element* of(const float* memory) { return reinterpret_cast<const Element*>(memory); }
  static Value* values(float* memory) { return reinterpret_cast<Value*>(memory); }
};

/// Calls f with the layout for inputs of a dtype and head_dim.
template <class F>
inline void with_layout(Dtype dtype, int64_t head_dim, const F& f) {
  const auto with_dim = [&](auto operand) {
    using Operand = decltype(operand);
    switch (stride_dim(head_dim)) {
      case 64:
        return f(Layout<Operand, 64>{});
      case 128:
        return f(Layout<Operand, 128>{});
      default:
        return f(Layout<Operand, kMaxHeadDim>{});
    }
  };
#if defined(KVCORE_ISA_AVX512_BF16)
  if (dtype == Dtype::kBFloat16) return with_dim(Bf16Operand{});
#else
  (void)dtype;
#endif
  with_dim(Fp32Operand{});
}

/// Pairs of rows, the second operand whose inner index is that of the rows: in `memory`, or the
/// rows themselves.
template <class L>
inline const typename L::Element* pairs_of(float* rows, int num_rows, int dim, float* memory) {
  if constexpr (L::kPack == 2) {
    const BFloat16* const values = L::values(rows);
    for (int i = 0; i < num_rows; i += 2) {
      const BFloat16* const row = values + i * L::kDimStride;
      L::Operand::pack(row, row + L::kDimStride, dim, L::of(memory) + i / 2 * L::kDimStride);
    }
    return L::of(memory);
  } else {
    return rows;
  }
}

/// First operand [dim, rows] whose inner index is that of the rows, of a block of keys.
template <class L>
inline void by_channel_of(float* rows, int num_rows, int dim, float* pairs, float* out) {
  transpose(pairs_of<L>(rows, num_rows, dim, pairs), L::kDimStride,
            whole_blocks(num_rows / L::kPack), dim, L::of(out), L::kKeyFirst);
}

/// Second operand [dim, queries] whose inner index is that of the channels.
template <class L>
inline void across_channels(float* rows, int num_rows, int dim, float* out) {
  transpose(L::of(rows), L::kDimFirst, num_rows, whole_blocks(dim / L::kPack), L::of(out),
            kQueryStride);
}

/// Whether no value of the rows is NaN or infinite.
template <class T>
inline bool all_finite(const T* rows, int64_t stride, int num_rows, int dim) {
  F32 sum = splat(0.0f);
  for (int i = 0; i < num_rows; ++i) {
    for (int c = 0; c < dim; c += kLanes) {
      sum = fma(load(rows + i * stride + c), splat(0.0f), sum);
    }
  }
  return reduce_add(sum) == 0.0f;
}

/// Rows of a block or tile that exist, and whole groups of them.
struct Extent {
  int count, padded_count;
};
inline Extent extent_of(int64_t length, int64_t begin, int size) {
  const int64_t left = length - begin;
  const int count = static_cast<int>(left < size ? left : size);
  return {count, whole_blocks(count)};
}

/// What of a block of keys the queries of a tile see.
struct Seen {
  int keys;      // of the block, up to the last that is seen, and columns of the tile: in whole
  int columns;   // groups, of which
  int num_keys;  // these exist
  int num_queries;
  int64_t offset;  // keys of the block before the one of the tile's first query
  bool partly;     // some of these queries do not see some of these keys

  /// The first query that sees a key, counted from the tile's first.
  int first_query(int key) const {
    const int64_t first = key < num_keys ? key - offset : columns;
    return static_cast<int>(first < 0 ? 0 : first < columns ? first : columns);
  }
  bool sees(int query, int key) const { return first_query(key) <= query && query < num_queries; }
};
template <class Params>
inline Seen seen_of(const Params& p, int64_t block, int64_t tile) {
  const Sizes& s = p.sizes;
  const Extent keys = extent_of(s.kv_len, block * kKeys, kKeys);
  const Extent queries = extent_of(s.q_len, tile * kQueries, kQueries);
  Seen seen = {.keys = keys.padded_count,
               .columns = queries.padded_count,
               .num_keys = keys.count,
               .num_queries = queries.count,
               .offset = kKeys,
               .partly = false};
  if (p.causal) {
    seen.offset = tile * kQueries + s.kv_len - s.q_len - block * kKeys;
    const int64_t last = seen.offset + queries.count;  // past the key of the last query
    if (last < keys.count) seen.keys = last > 0 ? whole_blocks(static_cast<int>(last)) : 0;
  }
  seen.partly =
      seen.num_keys < seen.keys || seen.num_queries < seen.columns || seen.offset + 1 < seen.keys;
  return seen;
}

/// C += A B like product, without the terms that are hidden: their weight is 0, but 0 * NaN is NaN.
/// For partly seen pairs with something that is not finite; `shown` takes a row, a column and an
/// inner index.
template <class L, class Shown>
inline void product_of_shown(const typename L::Element* a, int64_t a_stride,
                             const typename L::Element* b, int64_t b_stride, float* c,
                             int64_t c_stride, int rows, int columns, int inner,
                             const Shown& shown) {
  using Value = typename L::Value;
  const auto* const first = reinterpret_cast<const Value*>(a);
  const auto* const second = reinterpret_cast<const Value*>(b);
  constexpr int kPack = L::kPack;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      float sum = c[i * c_stride + j];
      for (int k = 0; k < inner; ++k) {
        if (!shown(i, j, k)) continue;
        sum += widen(first[i * a_stride * kPack + k]) *
               widen(second[(k / kPack * b_stride + j) * kPack + k % kPack]);
      }
      c[i * c_stride + j] = sum;
    }
  }
}

}  // namespace kvcore::dense::KVCORE_ISA
