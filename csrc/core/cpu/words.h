// 16-bit integers of one ISA level, 2 * kLanes in a vector, and their products. For code that is
// compiled per level.
#pragma once

#include "core/cpu/vec.h"

namespace kvcore::KVCORE_ISA {

constexpr int kWords = 2 * kLanes;

#if defined(KVCORE_VEC_512)

/// acc + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] in lane i; wraps around.
inline I32 dot_words(I32 acc, Bytes a, Bytes b) {
#if defined(KVCORE_ISA_AVX512)
  return acc + (I32)_mm512_madd_epi16(a, b);
#else
  return (I32)_mm512_dpwssd_epi32((__m512i)acc, a, b);
#endif
}
/// a * b / 2^15 rounded to nearest, half up.
inline Bytes mul_high_words(Bytes a, Bytes b) { return _mm512_mulhrs_epi16(a, b); }
inline Bytes add_words(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes sub_words(Bytes a, Bytes b) { return _mm512_sub_epi16(a, b); }
/// The low byte of each word in the place of the high one, and the high one with its sign.
inline Bytes raise_bytes(Bytes x) { return _mm512_slli_epi16(x, 8); }
inline Bytes high_bytes(Bytes x) { return _mm512_srai_epi16(x, 8); }
inline Bytes abs_words(Bytes x) { return _mm512_abs_epi16(x); }
inline Bytes max_words(Bytes a, Bytes b) { return _mm512_max_epi16(a, b); }
/// Word i sets bits kWordBits * i and up where a < b.
constexpr int kWordBits = 1;
inline uint32_t less_words(Bytes a, Bytes b) { return _mm512_cmplt_epi16_mask(a, b); }
/// Each lane as a word, saturated, in order.
inline void store_words(int16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16((__m512i)x));
}
/// The inverse.
inline I32 load_words(const int16_t* p) {
  return (I32)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I32 abs_i32(I32 x) { return (I32)_mm512_abs_epi32((__m512i)x); }

#elif defined(KVCORE_VEC_256)

/// acc + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] in lane i; wraps around.
inline I32 dot_words(I32 acc, Bytes a, Bytes b) { return acc + (I32)_mm256_madd_epi16(a, b); }
/// a * b / 2^15 rounded to nearest, half up.
inline Bytes mul_high_words(Bytes a, Bytes b) { return _mm256_mulhrs_epi16(a, b); }
inline Bytes add_words(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes sub_words(Bytes a, Bytes b) { return _mm256_sub_epi16(a, b); }
/// The low byte of each word in the place of the high one, and the high one with its sign.
inline Bytes raise_bytes(Bytes x) { return _mm256_slli_epi16(x, 8); }
inline Bytes high_bytes(Bytes x) { return _mm256_srai_epi16(x, 8); }
inline Bytes abs_words(Bytes x) { return _mm256_abs_epi16(x); }
inline Bytes max_words(Bytes a, Bytes b) { return _mm256_max_epi16(a, b); }
/// Word i sets bits kWordBits * i and up where a < b.
constexpr int kWordBits = 2;
inline uint32_t less_words(Bytes a, Bytes b) {
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(b, a)));
}
/// Each lane as a word, saturated, in order.
inline void store_words(int16_t* p, I32 x) {
  const __m128i low = _mm256_castsi256_si128((__m256i)x);
  const __m128i high = _mm256_extracti128_si256((__m256i)x, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
}
/// The inverse.
inline I32 load_words(const int16_t* p) {
  return (I32)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I32 abs_i32(I32 x) { return (I32)_mm256_abs_epi32((__m256i)x); }

#else

typedef int16_t SignedWords __attribute__((vector_size(16)));

/// acc + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] in lane i; wraps around.
inline I32 dot_words(I32 acc, Bytes a, Bytes b) {
  const I32 x = (I32)a, y = (I32)b;
  const U32 low = (U32)((x << 16 >> 16) * (y << 16 >> 16)), high = (U32)((x >> 16) * (y >> 16));
  return (I32)((U32)acc + low + high);
}
/// a * b / 2^15 rounded to nearest, half up.
inline Bytes mul_high_words(Bytes a, Bytes b) {
  const I32 x = (I32)a, y = (I32)b;
  const I32 low = ((x << 16 >> 16) * (y << 16 >> 16) + (1 << 14)) >> 15;
  const I32 high = ((x >> 16) * (y >> 16) + (1 << 14)) >> 15;
  return (Bytes)((low & 0xffff) | high << 16);
}
inline Bytes add_words(Bytes a, Bytes b) { return (Bytes)((Words)a + (Words)b); }
inline Bytes sub_words(Bytes a, Bytes b) { return (Bytes)((Words)a - (Words)b); }
/// The low byte of each word in the place of the high one, and the high one with its sign.
inline Bytes raise_bytes(Bytes x) { return (Bytes)((Words)x << 8); }
inline Bytes high_bytes(Bytes x) { return (Bytes)((SignedWords)x >> 8); }
inline Bytes abs_words(Bytes x) {
  return (Bytes)((SignedWords)x < 0 ? Words{} - (Words)x : (Words)x);
}
inline Bytes max_words(Bytes a, Bytes b) {
  const SignedWords x = (SignedWords)a, y = (SignedWords)b;
  return (Bytes)(x > y ? x : y);
}
/// Word i sets bits kWordBits * i and up where a < b.
constexpr int kWordBits = 1;
inline uint32_t less_words(Bytes a, Bytes b) {
  const SignedWords less = (SignedWords)a < (SignedWords)b;
  uint32_t bits = 0;
  for (int i = 0; i < kWords; ++i) bits |= static_cast<uint32_t>(less[i] & 1) << i;
  return bits;
}
/// Each lane as a word, saturated, in order.
inline void store_words(int16_t* p, I32 x) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<int16_t>(x[i] < -32768 ? -32768 : x[i] > 32767 ? 32767 : x[i]);
  }
}
/// The inverse.
inline I32 load_words(const int16_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
inline I32 abs_i32(I32 x) { return x < 0 ? -x : x; }

#endif

}  // namespace kvcore::KVCORE_ISA
