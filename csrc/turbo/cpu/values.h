// O = decay * O + weight * (P8 . V8) for a few rows and one page. Compiled per ISA level.
#pragma once

#include "core/cpu/dot.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

inline int32_t sum_p8(const uint8_t* p8) {
  I32 sum = splat_i32(0);
  const Bytes ones = splat_word(0x0101);
  for (int i = 0; i < kPageTokens; i += kVectorBytes) sum = dot_us(sum, load_bytes(p8 + i), ones);
  return reduce_add_i32(sum);
}

/// Channels [channel, channel + kVecs * kLanes) of kRows rows; their kRows * kVecs sums stay in
/// registers. Narrow V is never rebuilt: sum P (q step + zero) = step sum(P q) + zero sum(P), every
/// term an integer below 2^24 and so exact in fp32.
/// p8: [kRows, 64]; o: [kRows, head_dim]; p_sum: [kRows], for narrow V.
template <int kBits, int kRows, int kVecs>
[[gnu::flatten]] inline void channel_values(const uint8_t* block, int head_dim, int channel,
                                            const uint8_t* p8, const float* p_sum,
                                            const float* decay, const float* weight, float* o) {
  const uint8_t* codes = block + code_offset(kBits, head_dim) + channel * kInterleave;
  I32 acc[kRows][kVecs];
  unroll<kRows>([&](int r) { unroll<kVecs>([&](int i) { acc[r][i] = splat_i32(0); }); });
  if constexpr (kBits == 8) {
    for (int token = 0; token < kPageTokens; token += kInterleave) {
      Bytes v[kVecs];
      unroll<kVecs>([&](int i) { v[i] = load_bytes(codes + token * head_dim + i * kVectorBytes); });
      unroll<kRows>([&](int r) {
        const Bytes p = splat_dword(p8 + r * kPageTokens + token);
        unroll<kVecs>([&](int i) { acc[r][i] = dot_us(acc[r][i], p, v[i]); });
      });
    }
  } else {
    constexpr int kRowsOfCodes = kBits == 4 ? 8 : 4;
    constexpr int kPerByte = 8 / kBits;
    const Bytes mask = splat_word(((1 << kBits) - 1) * 0x0101);
    for (int row = 0; row < kRowsOfCodes; ++row) {
      Bytes x[kVecs];
      unroll<kVecs>([&](int i) {
        x[i] = load_bytes(codes + row * head_dim * kInterleave + i * kVectorBytes);
      });
      for (int part = 0; part < kPerByte; ++part) {
        // Parts of a byte are 16 tokens apart; at 4 bit the page's second half has its own rows.
        const int token = row % 4 * kInterleave + row / 4 * kChunk + part * 16;
        Bytes q[kVecs];
        unroll<kVecs>([&](int i) {
          q[i] = and_bytes(x[i], mask);
          x[i] = shift_words<kBits>(x[i]);
        });
        unroll<kRows>([&](int r) {
          const Bytes p = splat_dword(p8 + r * kPageTokens + token);
          unroll<kVecs>([&](int i) { acc[r][i] = dot_us(acc[r][i], q[i], p); });
        });
      }
    }
  }

  unroll<kRows>([&](int r) {
    unroll<kVecs>([&](int i) {
      const int at = channel + i * kLanes;
      F32 sum = to_f32(acc[r][i]);
      if constexpr (kBits != 8) {
        const F32 step = load_u8(block + kHeaderBytes + at);
        const F32 zero =
            load_s8(reinterpret_cast<const int8_t*>(block) + kHeaderBytes + head_dim + at);
        sum = fma(step, sum, zero * splat(p_sum[r]));
      }
      float* out = o + r * head_dim + at;
      store(out, fma(splat(weight[r]), sum, splat(decay[r]) * load(out)));
    });
  });
}

template <int kBits, int kRows, int kVecs>
inline void page_values(const uint8_t* block, int head_dim, const uint8_t* p8, const float* decay,
                        const float* weight, float* o) {
  float p_sum[kRows] = {};
  if constexpr (kBits != 8) {
    for (int r = 0; r < kRows; ++r) p_sum[r] = static_cast<float>(sum_p8(p8 + r * kPageTokens));
  }
  int channel = 0;
  for (; channel + kVecs * kLanes <= head_dim; channel += kVecs * kLanes) {
    channel_values<kBits, kRows, kVecs>(block, head_dim, channel, p8, p_sum, decay, weight, o);
  }
  // head_dim 96 is six vectors of 16.
  for (; channel < head_dim; channel += 2 * kLanes) {
    channel_values<kBits, kRows, 2>(block, head_dim, channel, p8, p_sum, decay, weight, o);
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
