// S8 = Q8 . K8 for a few rows and one page, in int32. Compiled per ISA level.
#pragma once

#include "core/cpu/dot.h"
#include "core/cpu/lanes.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

/// The lines of a block that is needed next, asked for a few at a time between other work. Blocks
/// lie anywhere in memory, so hardware prefetching starts anew at each, and at each page of memory.
class Fetch {
 public:
  /// All lines of `bytes` bytes within num_steps steps; null: none.
  Fetch(const uint8_t* block, int64_t bytes, int num_steps)
      : at_(block), per_step_(block ? static_cast<int>(bytes / 64 + num_steps) / num_steps : 0) {}
  void step() {
    for (int i = 0; i < per_step_; ++i) __builtin_prefetch(at_ + i * 64);
    at_ += per_step_ * 64;
  }

 private:
  const uint8_t* at_;
  int per_step_;
};

/// Steps and zeros of the channels of each byte of a vector, as `dequantize` takes them.
struct Levels {
  Bytes even_step;  // right in the even bytes
  Bytes odd_step;   // in the low half of 16-bit words
  Bytes zero;
};

inline Levels make_levels(Bytes step, Bytes zero) { return {step, shift_words<8>(step), zero}; }

/// q * step + zero per byte, of codes q.
inline Bytes dequantize(Bytes codes, const Levels& levels) {
  // There is no product of bytes. A word times the even step is right in its even byte; times the
  // odd step it is right in its odd byte, because q * step <= 246 of the even one does not carry.
  const Bytes even = mul_words(codes, levels.even_step);
  const Bytes odd = mul_words(codes, levels.odd_step);
  return add_bytes(even_or_odd(even, odd), levels.zero);
}

/// The codes of tokens [token, token + kLanes) and channels [channel, channel + 4) of narrow K,
/// channel = row / 4 * 32 + row % 4 * 4 + part * 16.
template <int kBits>
inline Bytes load_k_codes(const uint8_t* codes, int row, int part, int token) {
  // At 2 bit the page's second half lies above its first.
  constexpr int kRowTokens = kBits == 2 ? kPageTokens / 2 : kPageTokens;
  Bytes x = load_bytes(codes + (row * kRowTokens + token % kRowTokens) * kInterleave);
  if (token >= kRowTokens) x = shift_words<4>(x);
  if (part) x = shift_words<kBits>(x);
  return and_bytes(x, splat_word(((1 << kBits) - 1) * 0x0101));
}

/// Scores of kRows rows with 64 tokens; tokens go kVecs vectors at a time so that all
/// kRows * kVecs sums stay in registers.
/// q8: [kRows, head_dim]; s: [kRows, 64]. `next` is fetched meanwhile, may be null.
template <int kBits, int kRows, int kVecs>
[[gnu::flatten]] inline void page_scores(const uint8_t* block, int head_dim, const int8_t* q8,
                                         const int32_t* q_excess, const uint8_t* next,
                                         int64_t next_bytes, int32_t* s) {
  const uint8_t* codes = block + code_offset(kBits, head_dim);
  const uint8_t* step = block + kHeaderBytes;
  const uint8_t* zero = step + head_dim;
  constexpr int kTokens = kVecs * kLanes;
  static_assert(kPageTokens % kTokens == 0);
  constexpr int kStepChannels = kBits == 8 ? kInterleave : 2 * kInterleave;
  Fetch fetch(next, next_bytes, kPageTokens / kTokens * (head_dim / kStepChannels));
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
        fetch.step();
      }
    } else {
      for (int row = 0; row < head_dim / 8; ++row) {
        const int channel = row / 4 * kChunk + row % 4 * kInterleave;
        unroll<2>([&](int part) {  // channels 16 apart share a byte
          const int at = channel + part * 16;
          // The zeros take on what SignedBytes adds, so that it costs nothing per token.
          const Levels levels =
              make_levels(splat_dword(step + at), signed_offset(splat_dword(zero + at)));
          SignedBytes k[kVecs];
          unroll<kVecs>([&](int i) {
            const Bytes q = load_k_codes<kBits>(codes, row, part, token + i * kLanes);
            k[i] = offset_signed(dequantize(q, levels));
          });
          add(k, at);
        });
        fetch.step();
      }
    }
    unroll<kRows>([&](int r) {
      unroll<kVecs>([&](int i) { store_i32(s + r * kPageTokens + token + i * kLanes, acc[r][i]); });
    });
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
