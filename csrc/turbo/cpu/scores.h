// S8 = Q8 . K8 for a few rows and one page, in int32. Compiled per ISA level.
#pragma once

#include "core/cpu/dot.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

/// Steps and zeros of four neighbouring channels of a narrow block, as `dequantize` takes them:
/// the codes in the even and the odd bytes are multiplied apart, as 16-bit words.
struct Levels {
  Bytes even_step, odd_step, zero;
};

inline Levels make_levels(Bytes step, Bytes zero) {
  const Bytes low = splat_word(0x00ff);
  return {and_bytes(step, low), and_bytes(shift_words<8>(step), low), zero};
}

/// q * step + zero per byte; codes are the kBits low bits of each byte, whatever lies above.
template <int kBits>
inline Bytes dequantize(Bytes codes, const Levels& levels) {
  constexpr int kMask = (1 << kBits) - 1;
  // Neither product reaches its word's other byte: q * step <= 246.
  const Bytes even = mul_words(and_bytes(codes, splat_word(kMask)), levels.even_step);
  const Bytes odd = mul_words(and_bytes(codes, splat_word(kMask << 8)), levels.odd_step);
  return add_bytes(or_bytes(even, odd), levels.zero);
}

/// The codes of tokens [token, token + kLanes), the first part of each byte lowest.
template <int kBits>
inline Bytes narrow_codes(const uint8_t* codes, int row, int token) {
  if constexpr (kBits == 4) return load_bytes(codes + (row * kPageTokens + token) * kInterleave);
  // At 2 bit the page's second half lies above its first.
  constexpr int kRowTokens = kPageTokens / 2;
  const Bytes x = load_bytes(codes + (row * kRowTokens + token % kRowTokens) * kInterleave);
  return token < kRowTokens ? x : shift_words<4>(x);
}

/// Scores of kRows rows with 64 tokens; tokens go kVecs vectors at a time so that all
/// kRows * kVecs sums stay in registers.
/// q8: [kRows, head_dim]; s: [kRows, 64].
template <int kBits, int kRows, int kVecs>
[[gnu::flatten]] inline void page_scores(const uint8_t* block, int head_dim, const int8_t* q8,
                                         const int32_t* q_excess, int32_t* s) {
  const uint8_t* codes = block + code_offset(kBits, head_dim);
  const uint8_t* step = block + kHeaderBytes;
  const uint8_t* zero = step + head_dim;
  constexpr int kTokens = kVecs * kLanes;
  static_assert(kPageTokens % kTokens == 0);
  for (int token = 0; token < kPageTokens; token += kTokens) {
    I32 acc[kRows][kVecs];
    unroll<kRows>(
        [&](int r) { unroll<kVecs>([&](int i) { acc[r][i] = splat_i32(q_excess[r]); }); });
    const auto add = [&](const SignedBytes(&k)[kVecs], int channel) {
      unroll<kRows>([&](int r) {
        const Bytes q = splat_dword(q8 + r * head_dim + channel);
        unroll<kVecs>([&](int i) { acc[r][i] = dot_ss(acc[r][i], k[i], q); });
      });
    };
    if constexpr (kBits == 8) {
      for (int channel = 0; channel < head_dim; channel += kInterleave) {
        const uint8_t* group = codes + channel * kPageTokens + token * kInterleave;
        SignedBytes k[kVecs];
        unroll<kVecs>([&](int i) { k[i] = prepare_signed(load_bytes(group + i * kVectorBytes)); });
        add(k, channel);
      }
    } else {
      for (int row = 0; row < head_dim / 8; ++row) {
        const int channel = row / 4 * kChunk + row % 4 * kInterleave;
        for (int part = 0; part < 2; ++part) {  // channels 16 apart share a byte
          const int at = channel + part * 16;
          const Levels levels = make_levels(splat_dword(step + at), splat_dword(zero + at));
          SignedBytes k[kVecs];
          unroll<kVecs>([&](int i) {
            const int t = token + i * kLanes;
            const Bytes x = narrow_codes<kBits>(codes, row, t);
            k[i] = prepare_signed(dequantize<kBits>(part == 0 ? x : shift_words<kBits>(x), levels));
          });
          add(k, at);
        }
      }
    }
    unroll<kRows>([&](int r) {
      unroll<kVecs>([&](int i) { store_i32(s + r * kPageTokens + token + i * kLanes, acc[r][i]); });
    });
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
