// Models of the matrix instructions in core/cuda/mma.cuh: PTX's fragment layouts, integers exact.
// Float products are summed in double and rounded once; the hardware's own order and width differ
// in the last bits.
#pragma once

#include <cstdint>
#include <source_location>

#include "simt/copy.h"
#include "simt/scheduler.h"

namespace kvcore {
namespace simt {

/// Matrices of 8x8 16-bit elements: a lane brings one 16-byte row and gets a pair of each.
struct MatrixLoad {
  alignas(16) uint32_t row[4];
  uint32_t result[4];
};
extern const Collective kLdmatrix[4];       // by number of matrices - 1
extern const Collective kLdmatrixTrans[4];  // the same, transposed

/// Fragments of one lane; d is the accumulator, and the result.
struct MmaS8 {
  int32_t d[4];
  uint32_t a[4], b[2];
};
struct MmaFloat {
  float d[4];
  uint32_t a[4], b[2];
};
extern const Collective kMmaS8, kMmaF16, kMmaBf16, kMmaTf32;

template <int kMatrices>
inline void ldmatrix(const Collective& collective, uint32_t* result, const void* row,
                     const std::source_location& where) {
  MatrixLoad load{};
  // Only the first 8 * kMatrices lanes' addresses count.
  if (lane() < 8 * kMatrices) {
    check_aligned(row, 16, "ldmatrix: row address", where);
    check_shared(row, 16, "ldmatrix: row address", where);
    copy_words<16>(load.row, row);
  }
  meet(collective, kFullMask, &load, where);
  for (int i = 0; i < kMatrices; ++i) result[i] = load.result[i];
}

template <class Fragments, int kA, int kB, class D>
inline void mma(const Collective& collective, D (&d)[4], const uint32_t (&a)[kA],
                const uint32_t (&b)[kB], const std::source_location& where) {
  Fragments own{};
  for (int i = 0; i < 4; ++i) own.d[i] = d[i];
  for (int i = 0; i < kA; ++i) own.a[i] = a[i];
  for (int i = 0; i < kB; ++i) own.b[i] = b[i];
  meet(collective, kFullMask, &own, where);
  for (int i = 0; i < 4; ++i) d[i] = own.d[i];
}

}  // namespace simt

inline void ldmatrix_x1(uint32_t& r, const void* row,
                        std::source_location where = std::source_location::current()) {
  simt::ldmatrix<1>(simt::kLdmatrix[0], &r, row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row,
                        std::source_location where = std::source_location::current()) {
  simt::ldmatrix<2>(simt::kLdmatrix[1], r, row, where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        std::source_location where = std::source_location::current()) {
  simt::ldmatrix<4>(simt::kLdmatrix[3], r, row, where);
}
inline void ldmatrix_x1_trans(uint32_t& r, const void* row,
                              std::source_location where = std::source_location::current()) {
  simt::ldmatrix<1>(simt::kLdmatrixTrans[0], &r, row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              std::source_location where = std::source_location::current()) {
  simt::ldmatrix<2>(simt::kLdmatrixTrans[1], r, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              std::source_location where = std::source_location::current()) {
  simt::ldmatrix<4>(simt::kLdmatrixTrans[3], r, row, where);
}

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            std::source_location where = std::source_location::current()) {
  simt::mma<simt::MmaS8>(simt::kMmaS8, d, a, b, where);
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            int32_t c,
                            std::source_location where = std::source_location::current()) {
  for (int32_t& x : d) x = c;
  mma_m16n8k32_s8(d, a, b, where);
}
inline void mma_m16n8k16_s8(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b,
                            std::source_location where = std::source_location::current()) {
  const uint32_t wide_a[4] = {a[0], a[1], 0, 0}, wide_b[2] = {b, 0};
  mma_m16n8k32_s8(d, wide_a, wide_b, where);
}
inline void mma_m16n8k16_s8(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b, int32_t c,
                            std::source_location where = std::source_location::current()) {
  for (int32_t& x : d) x = c;
  mma_m16n8k16_s8(d, a, b, where);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             std::source_location where = std::source_location::current()) {
  simt::mma<simt::MmaFloat>(simt::kMmaF16, d, a, b, where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              std::source_location where = std::source_location::current()) {
  simt::mma<simt::MmaFloat>(simt::kMmaBf16, d, a, b, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             std::source_location where = std::source_location::current()) {
  simt::mma<simt::MmaFloat>(simt::kMmaTf32, d, a, b, where);
}

}  // namespace kvcore
