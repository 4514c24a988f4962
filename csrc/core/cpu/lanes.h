// Moves between vectors of one ISA level: reductions of several at once, packing, blending.
#pragma once

#include "core/cpu/vec.h"

namespace kvcore::KVCORE_ISA {

#if defined(KVCORE_VEC_512)

/// What the lanes of a, b, c and d reduce to, in lanes 0 to 3 and repeated above: transposing as it
/// goes, so that four rows cost little more than one.
template <class Combine>
inline F32 reduce4(F32 a, F32 b, F32 c, F32 d, const Combine& combine) {
  const F32 ab = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F32 cd = combine(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  F32 x = combine(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  x = combine(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return combine(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}
/// Lanes 0 to 3.
inline void store4(float* p, F32 x) { _mm_storeu_ps(p, _mm512_castps512_ps128(x)); }
/// The values of four vectors, in [0, 127], as bytes in order.
inline Bytes pack_bytes(const I32 (&x)[4]) {
  const __m512i low = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
  // Packing works within 128 bits, which leaves the dwords of the four vectors interleaved.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}
/// Even bytes of a, odd bytes of b.
inline Bytes even_or_odd(Bytes a, Bytes b) {
  return _mm512_mask_mov_epi8(a, 0xaaaaaaaaaaaaaaaaull, b);
}

#elif defined(KVCORE_VEC_256)

template <class Combine>
inline F32 reduce4(F32 a, F32 b, F32 c, F32 d, const Combine& combine) {
  const F32 ab = combine(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const F32 cd = combine(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const F32 x = combine(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return combine(x, _mm256_permute2f128_ps(x, x, 1));
}
inline void store4(float* p, F32 x) { _mm_storeu_ps(p, _mm256_castps256_ps128(x)); }
/// The values of four vectors, in [0, 127], as bytes in order.
inline Bytes pack_bytes(const I32 (&x)[4]) {
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  // Packing works within 128 bits, which leaves the dwords of the four vectors interleaved.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}
/// Even bytes of a, odd bytes of b.
inline Bytes even_or_odd(Bytes a, Bytes b) {
  return _mm256_blendv_epi8(a, b, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}

#else

template <class Combine>
inline F32 reduce4(F32 a, F32 b, F32 c, F32 d, const Combine& combine) {
  const F32 x = combine(F32{a[0], b[0], c[0], d[0]}, F32{a[2], b[2], c[2], d[2]});
  const F32 y = combine(F32{a[1], b[1], c[1], d[1]}, F32{a[3], b[3], c[3], d[3]});
  return combine(x, y);
}
inline void store4(float* p, F32 x) { memcpy(p, &x, sizeof x); }
/// The values of four vectors, in [0, 127], as bytes in order.
inline Bytes pack_bytes(const I32 (&x)[4]) {
  Bytes bytes;
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(x[i / 4][i % 4]);
  return bytes;
}
/// Even bytes of a, odd bytes of b.
inline Bytes even_or_odd(Bytes a, Bytes b) {
  const Bytes even = splat_word(0x00ff);
  return (a & even) | (b & ~even);
}

#endif

}  // namespace kvcore::KVCORE_ISA
