#include "simt/mma.h"

#include <cstring>

#include "simt/convert.h"

namespace kvcore::simt {
namespace {

// Row m of every matrix comes from lane 8 * matrix + m. Lane l gets elements 2 * (l % 4) and the
// next of row l / 4, or of column l / 4 if transposed.
template <int kMatrices, bool kTransposed>
void finish_ldmatrix(void* const (&brought)[kWarp], unsigned) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto* load = static_cast<const MatrixLoad*>(brought[8 * matrix + row]);
      std::memcpy(elements[row], load->row, 16);
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned major = l / 4, minor = l % 4 * 2;
      const uint32_t low = kTransposed ? elements[minor][major] : elements[major][minor];
      const uint32_t high = kTransposed ? elements[minor + 1][major] : elements[major][minor + 1];
      static_cast<MatrixLoad*>(brought[l])->result[matrix] = low | high << 16;
    }
  }
}

// Element i of a register.
float as_f16(uint32_t reg, int i) { return widen(Half{static_cast<uint16_t>(reg >> (16 * i))}); }
float as_bf16(uint32_t reg, int i) {
  return widen(BFloat16{static_cast<uint16_t>(reg >> (16 * i))});
}
// The low 13 bits are not part of the format; the hardware ignores them.
float as_tf32(uint32_t reg, int) { return bits_to_float(reg & 0xffffe000u); }
int as_s8(uint32_t reg, int i) { return static_cast<int8_t>(reg >> (8 * i)); }

// mma.sync m16n8kK with A row-major, B column-major. Lane l = 4 * g + t holds, kPack elements a
// register:
//   A: row g (registers 0, 2) or g + 8 (1, 3), columns kPack * t + i, and K / 2 further (2, 3)
//   B: column g, rows kPack * t + i, and K / 2 further (register 1)
//   D: row g (0, 1) or g + 8 (2, 3), columns 2 * t and the next
template <class Fragments, class Element, class Sum, int kK, Element (*kElement)(uint32_t, int)>
void finish_mma(void* const (&brought)[kWarp], unsigned) {
  constexpr int kPack = kK / 8;
  Element a[16][kK], b[8][kK];
  for (unsigned l = 0; l < kWarp; ++l) {
    const auto& own = *static_cast<const Fragments*>(brought[l]);
    const unsigned g = l / 4, t = l % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kPack; ++i) {
        const unsigned k = kPack * t + i + half * kK / 2;
        a[g][k] = kElement(own.a[2 * half], i);
        a[g + 8][k] = kElement(own.a[2 * half + 1], i);
        b[g][k] = kElement(own.b[half], i);
      }
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    auto& own = *static_cast<Fragments*>(brought[l]);
    for (unsigned e = 0; e < 4; ++e) {
      const unsigned row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      Sum sum = static_cast<Sum>(own.d[e]);
      for (int k = 0; k < kK; ++k) {
        sum += static_cast<Sum>(a[row][k]) * static_cast<Sum>(b[column][k]);
      }
      own.d[e] = static_cast<std::remove_reference_t<decltype(own.d[e])>>(sum);
    }
  }
}

}  // namespace

const Collective kLdmatrix[4] = {{"ldmatrix", &finish_ldmatrix<1, false>, true, false},
                                 {"ldmatrix", &finish_ldmatrix<2, false>, true, false},
                                 {},
                                 {"ldmatrix", &finish_ldmatrix<4, false>, true, false}};
const Collective kLdmatrixTrans[4] = {{"ldmatrix.trans", &finish_ldmatrix<1, true>, true, false},
                                      {"ldmatrix.trans", &finish_ldmatrix<2, true>, true, false},
                                      {},
                                      {"ldmatrix.trans", &finish_ldmatrix<4, true>, true, false}};
// The sum wraps, as the instruction without .satfinite does.
const Collective kMmaS8{"mma.m16n8k32.s8", &finish_mma<MmaS8, int, uint32_t, 32, &as_s8>, true,
                        false};
const Collective kMmaF16{"mma.m16n8k16.f16", &finish_mma<MmaFloat, float, double, 16, &as_f16>,
                         true, false};
const Collective kMmaBf16{"mma.m16n8k16.bf16", &finish_mma<MmaFloat, float, double, 16, &as_bf16>,
                          true, false};
const Collective kMmaTf32{"mma.m16n8k8.tf32", &finish_mma<MmaFloat, float, double, 8, &as_tf32>,
                          true, false};

}  // namespace kvcore::simt
