// O = decay * O + weight * (P8 . V8) for a few rows and one page. Compiled per ISA level.
#pragma once

#include "core/cpu/dot.h"
#include "turbo/cpu/scores.h"
#include "turbo/cpu/softmax.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

/// Channels [channel, channel + kVecs * kLanes) of kRows rows; their kRows * kVecs sums stay in
/// registers. Narrow V is never rebuilt: sum P (q step + zero) = step sum(P q) + zero sum(P), every
/// term an integer below 2^24 and so exact in fp32.
/// o: [kRows, head_dim].
template <int kBits, int kRows, int kVecs>
[[gnu::flatten]] inline void channel_values(const uint8_t* block, int head_dim, int channel,
                                            const PageUpdate<kRows>& u, Fetch& fetch, float* o) {
  const uint8_t* codes = block + code_offset(kBits, head_dim) + channel * kInterleave;
  I32 acc[kRows][kVecs];
  unroll<kRows>([&](int r) { unroll<kVecs>([&](int i) { acc[r][i] = splat_i32(0); }); });
  if constexpr (kBits == 8) {
    for (int token = 0; token < kPageTokens; token += kInterleave) {
      Bytes v[kVecs];
      unroll<kVecs>([&](int i) { v[i] = load_bytes(codes + token * head_dim + i * kVectorBytes); });
      unroll<kRows>([&](int r) {
        const Bytes p = splat_dword(u.p8 + r * kPageTokens + token);
        unroll<kVecs>([&](int i) { acc[r][i] = dot_us(acc[r][i], p, v[i]); });
      });
      fetch.step();
    }
  } else {
    constexpr int kRowsOfCodes = kBits == 4 ? 8 : 4;
    const Bytes mask = splat_word(((1 << kBits) - 1) * 0x0101);
    for (int row = 0; row < kRowsOfCodes; ++row) {
      Bytes x[kVecs];
      unroll<kVecs>([&](int i) {
        x[i] = load_bytes(codes + row * head_dim * kInterleave + i * kVectorBytes);
      });
      unroll<8 / kBits>([&](int part) {
        // Parts of a byte are 16 tokens apart; at 4 bit the page's second half has its own rows.
        const int token = row % 4 * kInterleave + row / 4 * kChunk + part * 16;
        Bytes q[kVecs];
        unroll<kVecs>([&](int i) {
          q[i] = and_bytes(x[i], mask);
          x[i] = shift_words<kBits>(x[i]);
        });
        unroll<kRows>([&](int r) {
          const Bytes p = splat_dword(u.p8 + r * kPageTokens + token);
          unroll<kVecs>([&](int i) { acc[r][i] = dot_us(acc[r][i], q[i], p); });
        });
      });
      fetch.step();
    }
  }

  unroll<kVecs>([&](int i) {
    const int at = channel + i * kLanes;
    F32 step, zero;
    if constexpr (kBits != 8) {
      step = load_u8(block + kHeaderBytes + at);
      zero = load_s8(reinterpret_cast<const int8_t*>(block) + kHeaderBytes + head_dim + at);
    }
    unroll<kRows>([&](int r) {
      F32 sum = to_f32(acc[r][i]);
      if constexpr (kBits != 8) sum = fma(step, sum, zero * splat(u.p_sum[r]));
      float* out = o + r * head_dim + at;
      store(out, fma(splat(u.weight[r]), sum, splat(u.decay[r]) * load(out)));
    });
  });
}

/// `next` is fetched meanwhile, may be null.
template <int kBits, int kRows, int kVecs>
inline void page_values(const uint8_t* block, int head_dim, const PageUpdate<kRows>& u,
                        const uint8_t* next, int64_t next_bytes, float* o) {
  constexpr int kSteps = kBits == 8 ? kPageTokens / kInterleave : 2 * kBits;
  Fetch fetch(next, next_bytes, kSteps * (head_dim / (kVecs * kLanes)));
  int channel = 0;
  for (; channel + kVecs * kLanes <= head_dim; channel += kVecs * kLanes) {
    channel_values<kBits, kRows, kVecs>(block, head_dim, channel, u, fetch, o);
  }
  // head_dim 96 is six vectors of 16.
  for (; channel < head_dim; channel += 2 * kLanes) {
    channel_values<kBits, kRows, 2>(block, head_dim, channel, u, fetch, o);
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
