// Stage 2 and the packed order of codes: blocks from row-major int8 codes and back. For code that
// is compiled per ISA level. `codes` are [kPageTokens][head_dim], kv is 0 for K and 1 for V.
//
// Both orders of layout.h are the same two steps. First, codes that share a byte are merged, which
// leaves `rows` rows of `width` bytes:
//
//            K: rows x width          V: rows x width
//   8 bit    64 x head_dim            64 x head_dim
//   4 bit    64 x head_dim / 2        32 x head_dim
//   2 bit    32 x head_dim / 2        16 x head_dim
//
// Then K's dwords are transposed and four rows of V at a time are interleaved byte by byte.
#pragma once

#include <cstring>

#include "core/cpu/vec.h"
#include "turbo/layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvcore::turbo::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

constexpr int kMaxCodes = kPageTokens * kMaxHeadDim;

constexpr int packed_rows(int kv, int bits) {
  if (kv == 0) return bits == 2 ? kPageTokens / 2 : kPageTokens;
  return kPageTokens * bits / 8;
}
constexpr int packed_width(int kv, int bits, int head_dim) {
  return kv == 0 && bits != 8 ? head_dim / 2 : head_dim;
}

/// out[c][r] = in[r][c] of dwords; both counts are multiples of 4.
inline void transpose_dwords(const uint8_t* in, int rows, int columns, uint8_t* out) {
#if defined(__SSE2__)
  const auto load4 = [](const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  const auto store4 = [](uint8_t* p, __m128i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
  };
  for (int c = 0; c < columns; c += 4) {
    for (int r = 0; r < rows; r += 4) {
      const uint8_t* from = in + (r * columns + c) * 4;
      const __m128i a = load4(from), b = load4(from + columns * 4);
      const __m128i d = load4(from + columns * 8), e = load4(from + columns * 12);
      const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
      const __m128i de_low = _mm_unpacklo_epi32(d, e), de_high = _mm_unpackhi_epi32(d, e);
      uint8_t* to = out + (c * rows + r) * 4;
      store4(to, _mm_unpacklo_epi64(ab_low, de_low));
      store4(to + rows * 4, _mm_unpackhi_epi64(ab_low, de_low));
      store4(to + rows * 8, _mm_unpacklo_epi64(ab_high, de_high));
      store4(to + rows * 12, _mm_unpackhi_epi64(ab_high, de_high));
    }
  }
#else
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) memcpy(out + (c * rows + r) * 4, in + (r * columns + c) * 4, 4);
  }
#endif
}

/// Four rows of bytes to one of dwords, and back.
inline void interleave_rows(const uint8_t* in, int rows, int width, uint8_t* out) {
  for (int r = 0; r < rows; r += 4, in += 4 * width, out += 4 * width) {
    for (int c = 0; c < width; ++c) {
      const uint32_t dword = in[c] | uint32_t{in[width + c]} << 8 |
                             uint32_t{in[2 * width + c]} << 16 | uint32_t{in[3 * width + c]} << 24;
      memcpy(out + 4 * c, &dword, 4);
    }
  }
}
inline void deinterleave_rows(const uint8_t* in, int rows, int width, uint8_t* out) {
  for (int r = 0; r < rows; r += 4, in += 4 * width) {
    for (int lane = 0; lane < 4; ++lane, out += width) {
      for (int c = 0; c < width; ++c) out[c] = in[4 * c + lane];
    }
  }
}

// 16 bytes, which is half a chunk of 32 channels, whatever the level.
typedef uint8_t HalfChunk __attribute__((vector_size(kChunk / 2)));
typedef uint16_t HalfChunkWords __attribute__((vector_size(kChunk / 2)));

inline HalfChunk load_half_chunk(const uint8_t* p) {
  HalfChunk x;
  memcpy(&x, p, sizeof x);
  return x;
}
/// Bytes below 2^(8 - shift), shifted left.
inline HalfChunk shift_left(HalfChunk x, int shift) {
  const uint16_t count = static_cast<uint16_t>(shift);
  return (HalfChunk)((HalfChunkWords)x << count);
}
/// `bits` bits of each byte from bit `shift` on.
inline HalfChunk field(HalfChunk x, int shift, int bits) {
  HalfChunk mask;
  memset(&mask, (1 << bits) - 1, sizeof mask);
  const uint16_t count = static_cast<uint16_t>(shift);
  return (HalfChunk)((HalfChunkWords)x >> count) & mask;
}

/// Narrow codes, one in a byte, to merged rows, and back.
inline void merge_rows(int kv, int bits, int head_dim, const uint8_t* in, uint8_t* out) {
  if (kv == 0) {
    const auto merged = [bits](const uint8_t* row) {
      return load_half_chunk(row) | shift_left(load_half_chunk(row + kChunk / 2), bits);
    };
    for (int t = 0; t < packed_rows(0, bits); ++t) {
      for (int chunk = 0; chunk < head_dim; chunk += kChunk, out += kChunk / 2) {
        const uint8_t* row = in + t * head_dim + chunk;
        HalfChunk x = merged(row);
        if (bits == 2) x |= shift_left(merged(row + kPageTokens / 2 * head_dim), 4);
        memcpy(out, &x, sizeof x);
      }
    }
    return;
  }
  // Tokens 16 apart share a byte: all four groups of them at 2 bit, two of each chunk at 4 bit.
  const int apart = kChunk / 2 * head_dim;
  for (int chunk = 0; chunk < (bits == 4 ? 2 : 1); ++chunk) {
    for (int i = 0; i < apart; ++i, ++in) {
      const int first = in[0] | in[apart] << bits;
      const int last = bits == 4 ? 0 : in[2 * apart] | in[3 * apart] << bits;
      *out++ = static_cast<uint8_t>(first | last << 4);
    }
    in += apart;
  }
}
inline void split_rows(int kv, int bits, int head_dim, const uint8_t* in, uint8_t* out) {
  if (kv == 0) {
    const auto split = [bits](HalfChunk x, int shift, uint8_t* row) {
      const HalfChunk first = field(x, shift, bits), second = field(x, shift + bits, bits);
      memcpy(row, &first, sizeof first);
      memcpy(row + kChunk / 2, &second, sizeof second);
    };
    for (int t = 0; t < packed_rows(0, bits); ++t) {
      for (int chunk = 0; chunk < head_dim; chunk += kChunk, in += kChunk / 2) {
        uint8_t* row = out + t * head_dim + chunk;
        split(load_half_chunk(in), 0, row);
        if (bits == 2) split(load_half_chunk(in), 4, row + kPageTokens / 2 * head_dim);
      }
    }
    return;
  }
  const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1);
  const int apart = kChunk / 2 * head_dim;
  for (int group = 0; group < 4; ++group, out += apart) {
    const uint8_t* from = in + (bits == 4 ? group / 2 * apart : 0);
    const int shift = bits == 4 ? group % 2 * 4 : group * 2;
    for (int i = 0; i < apart; ++i) out[i] = from[i] >> shift & mask;
  }
}

// Stage 2 works on 16-bit lanes.
constexpr int kWordLanes = kVectorBytes / 2;
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes)));
typedef uint8_t U8 __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t S8 __attribute__((vector_size(kVectorBytes / 2)));

inline U16 splat_u16(int x) {
  const uint16_t word = static_cast<uint16_t>(x);
  return U16{} + word;
}
inline U16 mul_high(U16 a, U16 b) {
#if defined(KVCORE_VEC_512)
  return (U16)_mm512_mulhi_epu16((__m512i)a, (__m512i)b);
#elif defined(KVCORE_VEC_256)
  return (U16)_mm256_mulhi_epu16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U16)_mm_mulhi_epu16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < kWordLanes; ++i) a[i] = static_cast<uint16_t>(uint32_t{a[i]} * b[i] >> 16);
  return a;
#endif
}

// Quotients of codes without division: floor(n / d) = n * ceil(2^16 / d) >> 16 for n <= 278 and
// 2 <= d <= 80, since n * (d - 1) < 2^16. The largest n is a range of 238 and half of step 80.
// For d = 1 the factor would need a 17th bit; with 2^16 - 1 the quotient is n - 1 for n >= 1.
constexpr int kMaxStep = 80;
struct Reciprocals {
  uint16_t of[kMaxStep + 1];
  constexpr Reciprocals() : of{0, 0xffff} {
    for (int d = 2; d <= kMaxStep; ++d) of[d] = static_cast<uint16_t>(((1 << 16) + d - 1) / d);
  }
};
constexpr Reciprocals kReciprocals;

inline U16 reciprocals(U16 step) {
  U16 result{};
  for (int i = 0; i < kWordLanes; ++i) result[i] = kReciprocals.of[step[i]];
  return result;
}

/// What rounds a quotient by a step to nearest, ties up; 1, not 0, for step 1: see above.
inline U16 half_of(U16 step) {
  const U16 half = step >> 1, one = splat_u16(1);
  return half > one ? half : one;
}

inline U16 saturating_sub(U16 a, U16 b) { return a > b ? a - b : U16{}; }

/// From a channel's least code to its zero: half of what the steps do not reach, to even.
inline U16 shift_of(U16 range, U16 step, U16 levels) {
  const U16 excess = saturating_sub(range, step * levels);
  return (excess + (excess >> 1 & splat_u16(1))) >> 1;
}

/// Sum of squared errors per channel, as 256 * high + low with low < 256: it can pass 16 bits.
struct StepError {
  U16 high, low;

  U16 is_below(const StepError& other) const {
    return (U16)(high < other.high) | ((U16)(high == other.high) & (U16)(low < other.low));
  }
};

/// That of one step and shift per channel.
inline StepError step_error(const U16* above_least, U16 step, U16 shift, U16 levels) {
  const U16 reciprocal = reciprocals(step), half = half_of(step), byte = splat_u16(0xff);
  constexpr int kPart = 32;  // an error is at most 40: the squares of so many fit
  StepError sum{};
  for (int first = 0; first < kPageTokens; first += kPart) {
    U16 part{};
    for (int t = first; t < first + kPart; ++t) {
      // A tie rounds up here; rounding it to even makes an error of the same size.
      U16 q = mul_high(saturating_sub(above_least[t], shift) + half, reciprocal);
      q = q < levels ? q : levels;
      const U16 error = q * step + shift - above_least[t];
      part += error * error;
    }
    sum.high += part >> 8;
    sum.low += part & byte;
  }
  sum.high += sum.low >> 8;
  sum.low &= byte;
  return sum;
}

/// Stage 2 of one page: narrow codes one in a byte, step and zero [head_dim].
inline void narrow_codes(const int8_t* codes, int bits, int head_dim, uint8_t* narrow,
                         uint8_t* step_out, int8_t* zero_out) {
  const U16 levels = splat_u16((1 << bits) - 1), one = splat_u16(1);
  for (int c = 0; c < head_dim; c += kWordLanes) {
    S8 least, top;
    memcpy(&least, codes + c, sizeof least);
    top = least;
    for (int t = 1; t < kPageTokens; ++t) {
      S8 q8;
      memcpy(&q8, codes + t * head_dim + c, sizeof q8);
      least = q8 < least ? q8 : least;
      top = q8 > top ? q8 : top;
    }
    U16 above_least[kPageTokens];
    for (int t = 0; t < kPageTokens; ++t) {
      S8 q8;
      memcpy(&q8, codes + t * head_dim + c, sizeof q8);
      above_least[t] = __builtin_convertvector((U8)q8 - (U8)least, U16);
    }
    const U16 range = __builtin_convertvector((U8)top - (U8)least, U16);
    const U16 by_levels = splat_u16(kReciprocals.of[(1 << bits) - 1]);
    const U16 nearest = mul_high(range + (levels >> 1), by_levels);
    const U16 ceiling = mul_high(range + levels - one, by_levels);
    U16 step = nearest > one ? nearest : one;
    U16 shift = shift_of(range, step, levels);
    StepError least_error = step_error(above_least, step, shift, levels);
    const auto try_step = [&](U16 other) {
      other = other > one ? other : one;
      const U16 other_shift = shift_of(range, other, levels);
      const StepError error = step_error(above_least, other, other_shift, levels);
      const U16 better = error.is_below(least_error);
      step = better ? other : step;
      shift = better ? other_shift : shift;
      least_error.high = better ? error.high : least_error.high;
      least_error.low = better ? error.low : least_error.low;
    };
    try_step(ceiling);
    if (tries_short_step(bits)) {
      try_step((nearest * splat_u16(kShortStepEighths) + splat_u16(4)) >> 3);
    }

    const U16 reciprocal = reciprocals(step), half = half_of(step);
    for (int t = 0; t < kPageTokens; ++t) {
      const U16 a = saturating_sub(above_least[t], shift);
      U16 q = mul_high(a + half, reciprocal);
      // Rounded up from a tie to an odd number: the even one is below.
      const U16 tie = (U16)((q * step - a) * splat_u16(2) == step);
      q -= tie & q & one;
      q = q < levels ? q : levels;
      const U8 bytes = __builtin_convertvector(q, U8);
      memcpy(narrow + t * head_dim + c, &bytes, sizeof bytes);
    }
    const U8 step_bytes = __builtin_convertvector(step, U8);
    memcpy(step_out + c, &step_bytes, sizeof step_bytes);
    const S8 zero = (S8)((U8)least + __builtin_convertvector(shift, U8));
    memcpy(zero_out + c, &zero, sizeof zero);
  }
}

inline void write_header(uint8_t* block, float scale, int32_t page_idx) {
  const BlockHeader header{.scale = scale, .page_idx = page_idx, .zeros = {}};
  memcpy(block, &header, sizeof header);
}

/// Writes a whole block.
inline void pack_block(const int8_t* codes, int kv, int bits, int head_dim, float scale,
                       int32_t page_idx, uint8_t* block) {
  alignas(64) uint8_t narrow[kMaxCodes], merged[kMaxCodes / 2];
  write_header(block, scale, page_idx);
  const uint8_t* rows = reinterpret_cast<const uint8_t*>(codes);
  if (bits != 8) {
    uint8_t* step = block + kHeaderBytes;
    narrow_codes(codes, bits, head_dim, narrow, step, reinterpret_cast<int8_t*>(step + head_dim));
    merge_rows(kv, bits, head_dim, narrow, merged);
    rows = merged;
  }
  uint8_t* out = block + code_offset(bits, head_dim);
  const int num_rows = packed_rows(kv, bits), width = packed_width(kv, bits, head_dim);
  if (kv == 0) {
    transpose_dwords(rows, num_rows, width / 4, out);
  } else {
    interleave_rows(rows, num_rows, width, out);
  }
}

/// The stage-1 codes that a block stands for.
inline void unpack_block(const uint8_t* block, int kv, int bits, int head_dim, int8_t* codes) {
  alignas(64) uint8_t narrow[kMaxCodes], merged[kMaxCodes / 2];
  uint8_t* rows = bits == 8 ? reinterpret_cast<uint8_t*>(codes) : merged;
  const uint8_t* in = block + code_offset(bits, head_dim);
  const int num_rows = packed_rows(kv, bits), width = packed_width(kv, bits, head_dim);
  if (kv == 0) {
    transpose_dwords(in, width / 4, num_rows, rows);
  } else {
    deinterleave_rows(in, num_rows, width, rows);
  }
  if (bits == 8) return;
  split_rows(kv, bits, head_dim, merged, narrow);
  const uint8_t* step = block + kHeaderBytes;
  const uint8_t* zero = step + head_dim;
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < head_dim; ++c) {
      // Modulo 2^8: the sum is in the range of int8.
      codes[t * head_dim + c] = static_cast<int8_t>(narrow[t * head_dim + c] * step[c] + zero[c]);
    }
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
