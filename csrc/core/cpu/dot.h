// Byte dot products of one ISA level: lane i of acc gets the sum of four products. Exact in int32.
#pragma once

#include "core/cpu/vec.h"

namespace kvcore::KVCORE_ISA {

#if defined(KVCORE_ISA_AVX512_VNNI) || defined(KVCORE_ISA_AVX512_BF16)

/// Adds u * s, u unsigned and s signed.
inline I32 dot_us(I32 acc, Bytes u, Bytes s) {
  return (I32)_mm512_dpbusd_epi32((__m512i)acc, u, s);
}

/// Signed bytes made ready as the first operand of dot_ss.
struct SignedBytes {
  Bytes offset;
};
inline SignedBytes prepare_signed(Bytes x) {
  return {_mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80)))};
}
/// prepare_signed in two steps: offset_signed(x + signed_offset(y)) is prepare_signed(x + y).
inline Bytes signed_offset(Bytes y) {
  return _mm512_xor_si512(y, _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline SignedBytes offset_signed(Bytes x) { return {x}; }
/// dot_ss adds kSignedExcess * (sum of b's bytes) too much.
constexpr int kSignedExcess = 128;
inline I32 dot_ss(I32 acc, SignedBytes a, Bytes b) {
  return (I32)_mm512_dpbusd_epi32((__m512i)acc, a.offset, b);
}

#elif defined(KVCORE_VEC_512)

// vpmaddubsw adds two products in int16: exact for the codes here, |a| <= 127 and |b| <= 119.
inline I32 dot_us(I32 acc, Bytes u, Bytes s) {
  const __m512i pairs = _mm512_maddubs_epi16(u, s);
  return acc + (I32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
struct SignedBytes {
  Bytes magnitude;
  __mmask64 negative;
};
inline SignedBytes prepare_signed(Bytes x) { return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)}; }
inline Bytes signed_offset(Bytes y) { return y; }
inline SignedBytes offset_signed(Bytes x) { return prepare_signed(x); }
constexpr int kSignedExcess = 0;
inline I32 dot_ss(I32 acc, SignedBytes a, Bytes b) {
  const Bytes flipped = _mm512_mask_sub_epi8(b, a.negative, _mm512_setzero_si512(), b);
  return dot_us(acc, a.magnitude, flipped);
}

#elif defined(KVCORE_VEC_256)

// vpmaddubsw adds two products in int16: exact for the codes here, |a| <= 127 and |b| <= 119.
inline I32 dot_us(I32 acc, Bytes u, Bytes s) {
  const __m256i pairs = _mm256_maddubs_epi16(u, s);
  return acc + (I32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
struct SignedBytes {
  Bytes magnitude, value;
};
inline SignedBytes prepare_signed(Bytes x) { return {_mm256_abs_epi8(x), x}; }
inline Bytes signed_offset(Bytes y) { return y; }
inline SignedBytes offset_signed(Bytes x) { return prepare_signed(x); }
constexpr int kSignedExcess = 0;
inline I32 dot_ss(I32 acc, SignedBytes a, Bytes b) {
  return dot_us(acc, a.magnitude, _mm256_sign_epi8(b, a.value));
}

#else

// Bytes of lane i as four 32-bit values: shifting left and back extends the sign.
inline I32 dot_us(I32 acc, Bytes u, Bytes s) {
  const U32 a = (U32)u;
  const I32 b = (I32)s;
  acc += (I32)(a & 0xff) * (b << 24 >> 24);
  acc += (I32)(a >> 8 & 0xff) * (b << 16 >> 24);
  acc += (I32)(a >> 16 & 0xff) * (b << 8 >> 24);
  return acc + (I32)(a >> 24) * (b >> 24);
}
struct SignedBytes {
  Bytes value;
};
inline SignedBytes prepare_signed(Bytes x) { return {x}; }
inline Bytes signed_offset(Bytes y) { return y; }
inline SignedBytes offset_signed(Bytes x) { return prepare_signed(x); }
constexpr int kSignedExcess = 0;
inline I32 dot_ss(I32 acc, SignedBytes x, Bytes y) {
  const I32 a = (I32)x.value, b = (I32)y;
  acc += (a << 24 >> 24) * (b << 24 >> 24);
  acc += (a << 16 >> 24) * (b << 16 >> 24);
  acc += (a << 8 >> 24) * (b << 8 >> 24);
  return acc + (a >> 24) * (b >> 24);
}

#endif

}  // namespace kvcore::KVCORE_ISA
