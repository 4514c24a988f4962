// Vector primitives of one ISA level: kLanes fp32 or int32 values, or 4 * kLanes bytes. For code
// that is compiled per level; everything is in that level's namespace. F32 has the operators
// + - * / of the compiler's vector types.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cpu/half.h"
#include "core/types.h"

#if defined(KVCORE_ISA_AVX512) || defined(KVCORE_ISA_AVX512_VNNI) || defined(KVCORE_ISA_AVX512_BF16)
#define KVCORE_VEC_512 1
// GCC 12 takes the undefined operands of unmasked intrinsics for uninitialized variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(KVCORE_ISA_AVX2)
#define KVCORE_VEC_256 1
#include <immintrin.h>
#endif

namespace kvcore::KVCORE_ISA {

/// Added to a float |x| < 2^22 it leaves the nearest even integer in the low bits.
constexpr float kBias = 0x1.8p23f;

#if defined(KVCORE_VEC_512)

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
using F32 = __m512;
// Not __m512i, whose lanes are 64 bits wide: between the two, GCC copies sums back and forth.
typedef int32_t I32 __attribute__((vector_size(64)));
using Bytes = __m512i;
using Mask = __mmask16;

inline F32 splat(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store(Half* p, F32 x) {
  const __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
inline void store(BFloat16* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  const __m256i narrowed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed);
}

inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
/// The second operand where either is NaN.
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 abs(F32 x) { return _mm512_abs_ps(x); }
inline F32 round_even(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
/// 1.5 * 2^23 + ceil(x), |x| < 2^22.
inline F32 ceil_biased(F32 x) {
  return _mm512_add_round_ps(x, _mm512_set1_ps(kBias), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
/// x * 2^n for an integral n; the product must be normal or zero.
inline F32 scale_pow2(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
inline float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }

inline Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask less(I32 a, I32 b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
inline bool any(Mask m) { return m != 0; }
/// a where the mask is set, else b.
inline F32 select(Mask m, F32 a, F32 b) { return _mm512_mask_mov_ps(b, m, a); }

inline I32 splat_i32(int32_t x) { return (I32)_mm512_set1_epi32(x); }
inline I32 load_i32(const int32_t* p) { return (I32)_mm512_loadu_si512(p); }
inline void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, (__m512i)x); }
inline I32 add_i32(I32 a, I32 b) { return a + b; }
inline I32 max_i32(I32 a, I32 b) { return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline int32_t reduce_add_i32(I32 x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline I32 iota() {
  return (I32)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline F32 to_f32(I32 x) { return _mm512_cvtepi32_ps((__m512i)x); }
/// Rounds to nearest even.
inline I32 to_i32(F32 x) { return (I32)_mm512_cvtps_epi32(x); }
/// The low byte of each lane, in order.
inline void store_low_bytes(void* p, I32 x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}
inline F32 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
inline F32 load_s8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
/// 32-bit lanes holding one byte each.
inline I32 load_u8_i32(const uint8_t* p) {
  return (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/// Lane i holds byte p[i] four times.
inline Bytes spread_bytes(const uint8_t* p) {
  return _mm512_mullo_epi32((__m512i)load_u8_i32(p), _mm512_set1_epi32(0x01010101));
}
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
/// The same four bytes in every lane.
inline Bytes splat_dword(const void* p) {
  int32_t dword;
  memcpy(&dword, p, sizeof dword);
  return _mm512_set1_epi32(dword);
}
/// The same two bytes in every 16-bit word.
inline Bytes splat_word(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
inline Bytes and_bytes(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes xor_bytes(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes mul_words(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, b); }
/// Shifts 16-bit words right, filling with zeros.
template <int kShift>
inline Bytes shift_words(Bytes a) {
  return _mm512_srli_epi16(a, kShift);
}

#elif defined(KVCORE_VEC_256)

constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
using F32 = __m256;
// Not __m256i, whose lanes are 64 bits wide: between the two, GCC copies sums back and forth.
typedef int32_t I32 __attribute__((vector_size(32)));
using Bytes = __m256i;
using Mask = __m256;

inline F32 splat(float x) { return _mm256_set1_ps(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32 load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, F32 x) {
  const __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
inline void store(BFloat16* p, F32 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  const __m128i narrowed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed);
}

inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
/// The second operand where either is NaN.
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 abs(F32 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F32 round_even(F32 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// 1.5 * 2^23 + ceil(x), |x| < 2^22.
inline F32 ceil_biased(F32 x) {
  const F32 up = _mm256_round_ps(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  return _mm256_add_ps(up, _mm256_set1_ps(kBias));
}
/// x * 2^n for an integral n; x in [2^-1, 2^1) and the product normal.
inline F32 scale_pow2(F32 x, F32 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
inline float reduce_max(F32 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float reduce_add(F32 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

inline Mask less(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask less(I32 a, I32 b) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32((__m256i)b, (__m256i)a));
}
inline bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
/// a where the mask is set, else b.
inline F32 select(Mask m, F32 a, F32 b) { return _mm256_blendv_ps(b, a, m); }

inline I32 splat_i32(int32_t x) { return (I32)_mm256_set1_epi32(x); }
inline I32 load_i32(const int32_t* p) {
  return (I32)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store_i32(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
}
inline I32 add_i32(I32 a, I32 b) { return a + b; }
inline I32 max_i32(I32 a, I32 b) { return (I32)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline int32_t reduce_add_i32(I32 x) {
  __m128i y =
      _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
inline I32 iota() { return (I32)_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline F32 to_f32(I32 x) { return _mm256_cvtepi32_ps((__m256i)x); }
/// Rounds to nearest even.
inline I32 to_i32(F32 x) { return (I32)_mm256_cvtps_epi32(x); }
/// The low byte of each lane, in order.
inline void store_low_bytes(void* p, I32 x) {
  const __m256i pick =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i picked = _mm256_shuffle_epi8((__m256i)x, pick);
  const __m128i bytes =
      _mm_or_si128(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), bytes);
}
inline F32 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
inline F32 load_s8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
/// 32-bit lanes holding one byte each.
inline I32 load_u8_i32(const uint8_t* p) {
  return (I32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

/// Lane i holds byte p[i] four times.
inline Bytes spread_bytes(const uint8_t* p) {
  return _mm256_mullo_epi32((__m256i)load_u8_i32(p), _mm256_set1_epi32(0x01010101));
}
inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_bytes(void* p, Bytes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
/// The same four bytes in every lane.
inline Bytes splat_dword(const void* p) {
  int32_t dword;
  memcpy(&dword, p, sizeof dword);
  return _mm256_set1_epi32(dword);
}
/// The same two bytes in every 16-bit word.
inline Bytes splat_word(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
inline Bytes and_bytes(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes xor_bytes(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes mul_words(Bytes a, Bytes b) { return _mm256_mullo_epi16(a, b); }
/// Shifts 16-bit words right, filling with zeros.
template <int kShift>
inline Bytes shift_words(Bytes a) {
  return _mm256_srli_epi16(a, kShift);
}

#else  // any CPU: the compiler's generic vectors, 128 bits wide

constexpr int kLanes = 4;
constexpr int kVectorRegisters = 16;
typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
using Mask = I32;

inline F32 splat(float x) { return F32{x, x, x, x}; }
template <class T>
inline F32 load(const T* p) {
  return F32{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
inline void store(T* p, F32 x) {
  for (int i = 0; i < kLanes; ++i) narrow(x[i], p + i);
}

/// Rounds twice: a fused product costs a library call where there is no instruction for it.
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
/// The second operand where either is NaN.
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 abs(F32 x) { return (F32)((I32)x & 0x7fffffff); }
inline F32 round_even(F32 x) { return (x + kBias) - kBias; }
/// 1.5 * 2^23 + ceil(x), |x| < 2^22.
inline F32 ceil_biased(F32 x) {
  const F32 nearest = x + kBias;
  return nearest - kBias < x ? nearest + 1.0f : nearest;
}
inline I32 to_i32(F32 x) { return (I32)(x + kBias) - 0x4b400000; }
inline F32 to_f32(I32 x) { return __builtin_convertvector(x, F32); }
/// x * 2^n for an integral n; x in [2^-1, 2^1) and the product normal. Or both NaN: x, then.
inline F32 scale_pow2(F32 x, F32 n) { return (F32)((I32)x + (n == n ? to_i32(n) << 23 : I32{})); }
inline float reduce_max(F32 x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline float reduce_add(F32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

inline Mask less(F32 a, F32 b) { return a < b; }
inline Mask less(I32 a, I32 b) { return a < b; }
inline bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
/// a where the mask is set, else b.
inline F32 select(Mask m, F32 a, F32 b) { return m ? a : b; }

inline I32 splat_i32(int32_t x) { return I32{x, x, x, x}; }
inline I32 load_i32(const int32_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
inline void store_i32(int32_t* p, I32 x) { memcpy(p, &x, sizeof x); }
inline I32 add_i32(I32 a, I32 b) { return a + b; }
inline I32 max_i32(I32 a, I32 b) { return a > b ? a : b; }
inline int32_t reduce_add_i32(I32 x) { return x[0] + x[1] + x[2] + x[3]; }
inline I32 iota() { return I32{0, 1, 2, 3}; }
/// The low byte of each lane, in order.
inline void store_low_bytes(void* p, I32 x) {
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(x[i]);
}
/// 32-bit lanes holding one byte each.
inline I32 load_u8_i32(const uint8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
inline F32 load_u8(const uint8_t* p) { return to_f32(load_u8_i32(p)); }
inline F32 load_s8(const int8_t* p) { return to_f32(I32{p[0], p[1], p[2], p[3]}); }

/// Lane i holds byte p[i] four times.
inline Bytes spread_bytes(const uint8_t* p) { return (Bytes)(load_u8_i32(p) * 0x01010101); }
inline Bytes load_bytes(const void* p) {
  Bytes x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store_bytes(void* p, Bytes x) { memcpy(p, &x, sizeof x); }
/// The same four bytes in every lane.
inline Bytes splat_dword(const void* p) {
  uint32_t dword;
  memcpy(&dword, p, sizeof dword);
  return (Bytes)U32{dword, dword, dword, dword};
}
/// The same two bytes in every 16-bit word.
inline Bytes splat_word(int x) { return (Bytes)(Words{} + static_cast<uint16_t>(x)); }
inline Bytes and_bytes(Bytes a, Bytes b) { return a & b; }
inline Bytes or_bytes(Bytes a, Bytes b) { return a | b; }
inline Bytes xor_bytes(Bytes a, Bytes b) { return a ^ b; }
inline Bytes add_bytes(Bytes a, Bytes b) { return a + b; }
inline Bytes mul_words(Bytes a, Bytes b) { return (Bytes)((Words)a * (Words)b); }
/// Shifts 16-bit words right, filling with zeros.
template <int kShift>
inline Bytes shift_words(Bytes a) {
  return (Bytes)((Words)a >> kShift);
}

#endif

constexpr int kVectorBytes = 4 * kLanes;

/// f(0), ..., f(kCount - 1) without a loop: arrays of vectors that are indexed so stay in
/// registers, where an unrolled loop would leave copies of them on the stack. For callers that are
/// [[gnu::flatten]], which makes f's argument a constant early enough.
template <int kCount, class F>
inline void unroll(const F& f) {
  if constexpr (kCount > 0) {
    unroll<kCount - 1>(f);
    f(kCount - 1);
  }
}

inline Bytes to_bytes(I32 x) { return (Bytes)x; }
/// The larger of floats >= 0, NaN above all: on many CPUs integers have more units for it.
inline F32 max_nonnegative(F32 a, F32 b) { return (F32)max_i32((I32)a, (I32)b); }
/// x * 2^n for n = n_biased - kBias; x in [2^-1, 2^1) and the product normal.
inline F32 scale_pow2_biased(F32 x, F32 n_biased) { return (F32)((I32)x + ((I32)n_biased << 23)); }

/// e^x for x <= 0, relative error below 2e-7; 0 below -87, where e^x is next to subnormal, so -inf
/// gives 0. NaN stays NaN.
inline F32 exp_nonpositive(F32 x) {
  const F32 n = round_even(max(splat(-87.0f), x) * splat(1.44269504f));
  // ln 2 in two parts, the first short enough for its product with n to be exact.
  F32 r = fma(n, splat(-0.693359375f), max(splat(-87.0f), x));
  r = fma(n, splat(2.12194440e-4f), r);
  // (e^r - 1) / r, minimax on |r| <= ln(2) / 2 for the relative error of e^r.
  F32 p = splat(1.384360358e-03f);
  p = fma(p, r, splat(8.374196405e-03f));
  p = fma(p, r, splat(4.166800483e-02f));
  p = fma(p, r, splat(1.666643079e-01f));
  p = fma(p, r, splat(4.999999419e-01f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return select(less(x, splat(-87.0f)), splat(0.0f), scale_pow2(p, n));
}

/// 2^x for x <= 0, relative error below 2e-7; 0 below -126, where 2^x is subnormal, so -inf gives
/// 0. NaN stays NaN.
inline F32 exp2_nonpositive(F32 x) {
  const F32 clipped = max(splat(-126.0f), x);
  const F32 n = round_even(clipped);
  const F32 r = clipped - n;
  // 2^r: the polynomial above, of r ln 2.
  F32 p = splat(1.535336188e-04f);
  p = fma(p, r, splat(1.339887440e-03f));
  p = fma(p, r, splat(9.618437357e-03f));
  p = fma(p, r, splat(5.550332548e-02f));
  p = fma(p, r, splat(2.402264791e-01f));
  p = fma(p, r, splat(6.931472029e-01f));
  p = fma(p, r, splat(1.0f));
  return select(less(x, splat(-126.0f)), splat(0.0f), scale_pow2(p, n));
}

/// The same for one value.
inline float exp_nonpositive(float x) {
  float lanes[kLanes];
  store(lanes, exp_nonpositive(splat(x)));
  return lanes[0];
}

}  // namespace kvcore::KVCORE_ISA
