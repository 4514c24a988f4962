// Products of small matrices in scratch memory: C = A B, row-major, with the operands of one ISA
// level. For code that is compiled per level.
//
// Every element of C is one chain of multiply-adds in the order of the inner index (at level amx,
// what gemm_tiles.h says), so a result does not depend on how a caller splits rows and columns.
#pragma once

#include "core/cpu/product.h"
#if defined(KVCORE_ISA_AMX)
#include "core/cpu/gemm_tiles.h"
#endif

namespace kvcore::KVCORE_ISA {

/// fp32 operands: one inner index per step.
struct Fp32Operand {
  using Element = float;
  static constexpr int kPack = 1;
  using Vector = F32;
  static Vector splat(const Element* p) { return KVCORE_ISA::splat(*p); }
  static Vector load(const Element* p) { return KVCORE_ISA::load(p); }
  static F32 mac(F32 acc, Vector a, Vector b) { return fma(a, b, acc); }
};

#if !defined(KVCORE_ISA_AMX)
/// Level amx configures its tiles.
inline void begin_products() {}
inline void end_products() {}
#endif

#if defined(KVCORE_ISA_AVX512_BF16)
/// Pairs of bf16 that follow each other along the inner index, the earlier one in the low half;
/// products and sums are fp32.
struct Bf16Operand {
  using Element = uint32_t;
  static constexpr int kPack = 2;
  using Vector = __m512bh;
  static Vector splat(const Element* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*p));
  }
  static Vector load(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static F32 mac(F32 acc, Vector a, Vector b) { return _mm512_dpbf16_ps(acc, a, b); }

  /// Rounds n values (a multiple of 16) to nearest even; below 2^-126 to 0, as products take them.
  static void narrow(const float* x, int n, BFloat16* out) {
    for (int i = 0; i < n; i += kLanes) {
      narrow(KVCORE_ISA::load(x + i), out + i);
    }
  }
  /// One vector, rounded so.
  static void narrow(F32 x, BFloat16* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
  }
  /// Two rows of n values (a multiple of 16) to one row of pairs.
  static void pack(const BFloat16* even, const BFloat16* odd, int n, Element* out) {
    for (int i = 0; i < n; i += kLanes) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i));
      _mm512_storeu_si512(out + i, interleave(low, high));
    }
  }
  /// Two vectors to pairs, rounded as above.
  static void pack(F32 even, F32 odd, Element* out) {
    // Packing puts one behind the other.
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, packed));
  }
  /// The same of each row times its factor, rounded as above.
  static void pack(const float* even, const float* odd, float even_factor, float odd_factor, int n,
                   Element* out) {
    const F32 e = KVCORE_ISA::splat(even_factor), o = KVCORE_ISA::splat(odd_factor);
    for (int i = 0; i < n; i += kLanes) {
      const __m256i low = (__m256i)_mm512_cvtneps_pbh(KVCORE_ISA::load(even + i) * e);
      const __m256i high = (__m256i)_mm512_cvtneps_pbh(KVCORE_ISA::load(odd + i) * o);
      _mm512_storeu_si512(out + i, interleave(low, high));
    }
  }

 private:
  static __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
};
#endif

// Rows and vectors of C in registers: 16 accumulators of 32, or 8 of 16, hide the latency of a
// multiply-add and leave room for the operands.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 2;

namespace detail {

template <class Operand, int kVectors, int kRowStride, int kInnerStride>
[[gnu::flatten]] inline void product_tile(const typename Operand::Element* a,
                                          const typename Operand::Element* b, int64_t b_stride,
                                          float* c, int64_t c_stride, int inner, Onto onto) {
  F32 acc[kTileRows][kVectors];
  unroll<kTileRows>([&](int i) {
    unroll<kVectors>([&](int v) {
      acc[i][v] = onto.scale == nullptr
                      ? splat(0.0f)
                      : load(c + i * c_stride + v * kLanes) * splat(onto.scale[i * onto.stride]);
    });
  });
  for (int k = 0; k < inner; ++k) {
    typename Operand::Vector row[kVectors];
    unroll<kVectors>([&](int v) { row[v] = Operand::load(b + v * kLanes); });
    unroll<kTileRows>([&](int i) {
      const typename Operand::Vector x = Operand::splat(a + i * kRowStride);
      unroll<kVectors>([&](int v) { acc[i][v] = Operand::mac(acc[i][v], x, row[v]); });
    });
    a += kInnerStride;
    b += b_stride;
  }
  unroll<kTileRows>([&](int i) {
    unroll<kVectors>([&](int v) { store(c + i * c_stride + v * kLanes, acc[i][v]); });
  });
}

#if defined(KVCORE_VEC_512)
/// 16 x 16 elements of 4 bytes, in four rounds of exchanges between rows.
inline void transpose_block(const void* x, int64_t x_stride, void* out, int64_t out_stride) {
  __m512 r[16], t[16];
  const float* from = static_cast<const float*>(x);
  float* to = static_cast<float*>(out);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * x_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1];
    const __m512d c = (__m512d)t[4 * i + 2], d = (__m512d)t[4 * i + 3];
    r[4 * i] = (__m512)_mm512_unpacklo_pd(a, c);
    r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, c);
    r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(b, d);
    r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to + i * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

}  // namespace detail

/// C [rows, columns] = A [rows, inner] B [inner, columns], or added to what `onto` says. rows and
/// columns are multiples of kProductMultiple. A[i][k] lies at a[i * kRowStride + k *
/// kInnerStride]: constant strides make its addresses free. With packed operands inner counts
/// values, strides count pairs.
template <class Operand, int kRowStride, int kInnerStride>
inline void product(const typename Operand::Element* a, const typename Operand::Element* b,
                    int64_t b_stride, float* c, int64_t c_stride, int rows, int columns, int inner,
                    Part part = Part::kAll, Onto onto = {}) {
#if defined(KVCORE_ISA_AMX)
  if constexpr (Operand::kPack == 2) {
    static_assert(kInnerStride == 1, "rows of a tile are contiguous");
    return product_by_tiles(a, kRowStride, b, b_stride, c, c_stride, rows, columns, inner, part,
                            onto);
  }
#endif
  constexpr int kWide = kTileVectors * kLanes;
  // Columns outside: their part of B stays in the first-level cache while the rows pass.
  for (int j = 0; j < columns;) {
    const int width = j + kWide <= columns ? kWide : kLanes;
    for (int i = 0; i < rows; i += kTileRows) {
      const int end_row = i + kTileRows;
      if (part == Part::kLowerC && j >= end_row) continue;
      const Range range = inner_range(part, i, end_row, inner);
      const auto* a_tile =
          a + static_cast<int64_t>(i) * kRowStride + range.begin / Operand::kPack * kInnerStride;
      const auto* b_tile = b + range.begin / Operand::kPack * b_stride + j;
      float* c_tile = c + i * c_stride + j;
      const int steps = (range.end - range.begin) / Operand::kPack;
      const Onto tile_onto = onto.from_row(i);
      if (width == kWide) {
        detail::product_tile<Operand, kTileVectors, kRowStride, kInnerStride>(
            a_tile, b_tile, b_stride, c_tile, c_stride, steps, tile_onto);
      } else {
        detail::product_tile<Operand, 1, kRowStride, kInnerStride>(a_tile, b_tile, b_stride, c_tile,
                                                                   c_stride, steps, tile_onto);
      }
    }
    j += width;
  }
}

/// out [columns, rows] = x [rows, columns] transposed, of 4-byte elements.
template <class T>
inline void transpose(const T* x, int64_t x_stride, int rows, int columns, T* out,
                      int64_t out_stride) {
  static_assert(sizeof(T) == 4);
  constexpr int kBlock = 16;
  for (int i = 0; i < rows; i += kBlock) {
    for (int j = 0; j < columns; j += kBlock) {
#if defined(KVCORE_VEC_512)
      detail::transpose_block(x + i * x_stride + j, x_stride, out + j * out_stride + i, out_stride);
#else
      for (int r = 0; r < kBlock; ++r) {
        for (int c = 0; c < kBlock; ++c) {
          out[(j + c) * out_stride + i + r] = x[(i + r) * x_stride + j + c];
        }
      }
#endif
    }
  }
}

}  // namespace kvcore::KVCORE_ISA
