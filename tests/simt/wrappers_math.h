// Arithmetic, conversions and approximations of wrappers.cu.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda/convert.cuh"
#include "core/cuda/online_softmax.cuh"
#include "core/cuda/packed.cuh"
#include "core/cuda/recompute.cuh"
#include "wrappers_support.h"

namespace wrappers {

// ---- One argument, one result

template <class F>
__global__ void map_kernel(F f, const uint32_t* in, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = f(in[i], in[(i + 1) % n], in[(i + 2) % n]);
}

template <class F>
std::vector<uint32_t> map(const std::vector<uint32_t>& in, F f) {
  Buffer<uint32_t> from(in), to{zeros(in.size())};
  const int n = static_cast<int>(in.size());
  launch(map_kernel<F>, static_cast<unsigned>(n + 255) / 256, 256, 0, nullptr, f,
         static_cast<const uint32_t*>(from.data()), to.data(), n);
  return to.values();
}

// A functor of three words; x, y and z are the same as floats.
#define KVCORE_MAP(name, expression)                                               \
  struct name {                                                                    \
    __device__ uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {     \
      [[maybe_unused]] const float x = __uint_as_float(a), y = __uint_as_float(b), \
                                   z = __uint_as_float(c);                         \
      (void)b, (void)c;                                                            \
      return expression;                                                           \
    }                                                                              \
  };

__device__ inline uint32_t word(float x) { return __float_as_uint(x); }
__device__ inline uint32_t word(int x) { return static_cast<uint32_t>(x); }
__device__ inline Half half_of(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
__device__ inline BFloat16 bfloat16_of(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
// One NaN for narrow types.
__device__ inline uint32_t narrow_half(float x) {
  return x != x ? 0x7e00u : from_float<Half>(x).bits;
}
__device__ inline uint32_t narrow_bfloat16(float x) {
  return x != x ? 0x7fc0u : from_float<BFloat16>(x).bits;
}

KVCORE_MAP(HalfToFloat, word(to_float(half_of(a))))
KVCORE_MAP(BFloat16ToFloat, word(to_float(bfloat16_of(a))))
KVCORE_MAP(FloatToHalf, narrow_half(x))
KVCORE_MAP(FloatToBFloat16, narrow_bfloat16(x))
KVCORE_MAP(FloatToTf32, to_tf32(x))
KVCORE_MAP(Pack, pack_floats<Half>(x != x ? 0.0f : x, y != y ? 0.0f : y))
KVCORE_MAP(Add, word(__fadd_rn(x, y)))
KVCORE_MAP(Sub, word(__fsub_rn(x, y)))
KVCORE_MAP(Mul, word(__fmul_rn(x, y)))
KVCORE_MAP(Div, word(__fdiv_rn(x, y)))
KVCORE_MAP(Fma, word(__fmaf_rn(x, y, z)))
KVCORE_MAP(Sqrt, word(__fsqrt_rn(x)))
KVCORE_MAP(Reciprocal, word(__frcp_rn(x)))
KVCORE_MAP(ToIntNearest, word(__float2int_rn(x)))
KVCORE_MAP(ToIntZero, word(__float2int_rz(x)))
KVCORE_MAP(ToIntDown, word(__float2int_rd(x)))
KVCORE_MAP(ToIntUp, word(__float2int_ru(x)))
KVCORE_MAP(ToUintNearest, __float2uint_rn(x))
KVCORE_MAP(ToUintZero, __float2uint_rz(x))
KVCORE_MAP(FromInt, word(__int2float_rn(static_cast<int>(a))))
KVCORE_MAP(FromUint, word(__uint2float_rn(a)))
KVCORE_MAP(MaxFloat, word(fmaxf(x, y)) & ((x == 0 && y == 0) ? 0u : ~0u))
KVCORE_MAP(MinFloat, word(fminf(x, y)) & ((x == 0 && y == 0) ? 0u : ~0u))
KVCORE_MAP(RoundUp, word(ceilf(x)))
KVCORE_MAP(QuietNan, word(quiet_nan()))
KVCORE_MAP(RoundEven, word(rintf(x)))
KVCORE_MAP(Dp4aSigned, word(__dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c))))
KVCORE_MAP(Dp4aUnsigned, __dp4a(a, b, c))
KVCORE_MAP(BytePerm, __byte_perm(a, b, c & 0x7777u))
KVCORE_MAP(Recompute, word(recompute(static_cast<int>(a))))
KVCORE_MAP(Popcount, word(__popc(a)))
KVCORE_MAP(LeadingZeros, word(__clz(static_cast<int>(a))))
KVCORE_MAP(FirstSet, word(__ffs(static_cast<int>(a))))
KVCORE_MAP(MulHigh, __umulhi(a, b))
KVCORE_MAP(FunnelShift, __funnelshift_r(a, b, c))
KVCORE_MAP(Sas, word(sas(-fabsf(x), -15.0f)))
KVCORE_MAP(ExpNonpositive, word(exp_nonpositive(-fabsf(x))))
KVCORE_MAP(Exp2, word(exp2_approx(x)))
KVCORE_MAP(Log2, word(log2_approx(x)))
KVCORE_MAP(Rcp, word(rcp_approx(x)))

// NaN operands are left out: the payload of their result is not promised.
__device__ inline uint32_t without_nan(uint32_t halves) {
  for (int shift = 0; shift < 32; shift += 16) {
    if ((halves >> shift & 0x7fff) > 0x7bff) halves &= ~(0xffffu << shift);
  }
  return halves;
}
__device__ inline uint32_t one_nan(uint32_t halves) {
  for (int shift = 0; shift < 32; shift += 16) {
    if ((halves >> shift & 0x7fff) > 0x7c00)
      halves = (halves & ~(0xffffu << shift)) | 0x7e00u << shift;
  }
  return halves;
}
KVCORE_MAP(FmaHalves, one_nan(fma_f16x2(without_nan(a), without_nan(b), without_nan(c))))

inline void arithmetic() {
  const std::vector<uint32_t> floats = float_patterns();
  const std::vector<uint32_t> words = random_words(1 << 14, 1);
  std::vector<uint32_t> halves(1 << 16);
  for (uint32_t i = 0; i < halves.size(); ++i) halves[i] = i;
  exact_floats("half_to_float", map(halves, HalfToFloat{}));
  exact_floats("bfloat16_to_float", map(halves, BFloat16ToFloat{}));
  exact("float_to_half", map(floats, FloatToHalf{}));
  exact("float_to_bfloat16", map(floats, FloatToBFloat16{}));
  exact_floats("float_to_tf32", map(floats, FloatToTf32{}));
  exact("pack_halves", map(floats, Pack{}));
  // Random operands, and neighbouring patterns of equal exponent.
  for (const auto& [suffix, in] : {std::pair{"_random", words}, std::pair{"_patterns", floats}}) {
    const std::string end = suffix;
    exact_floats("fadd" + end, map(in, Add{}));
    exact_floats("fsub" + end, map(in, Sub{}));
    exact_floats("fmul" + end, map(in, Mul{}));
    exact_floats("fdiv" + end, map(in, Div{}));
    exact_floats("fma" + end, map(in, Fma{}));
    exact_floats("fmax" + end, map(in, MaxFloat{}));
    exact_floats("fmin" + end, map(in, MinFloat{}));
    exact("fma_halves" + end, map(in, FmaHalves{}));
  }
  exact_floats("fsqrt", map(floats, Sqrt{}));
  exact_floats("frcp", map(floats, Reciprocal{}));
  exact_floats("ceil", map(floats, RoundUp{}));
  exact_floats("rint", map(floats, RoundEven{}));
  exact("float2int_rn", map(floats, ToIntNearest{}));
  exact("float2int_rz", map(floats, ToIntZero{}));
  exact("float2int_rd", map(floats, ToIntDown{}));
  exact("float2int_ru", map(floats, ToIntUp{}));
  exact("float2uint_rn", map(floats, ToUintNearest{}));
  exact("float2uint_rz", map(floats, ToUintZero{}));
  exact("int2float", map(words, FromInt{}));
  exact("uint2float", map(words, FromUint{}));
  exact("dp4a_signed", map(words, Dp4aSigned{}));
  exact("dp4a_unsigned", map(words, Dp4aUnsigned{}));
  exact("byte_perm", map(words, BytePerm{}));
  exact("recompute", map(words, Recompute{}));
  exact("popc", map(words, Popcount{}));
  exact("quiet_nan", map({0}, QuietNan{}));
  exact("clz", map(words, LeadingZeros{}));
  exact("ffs", map(words, FirstSet{}));
  exact("umulhi", map(words, MulHigh{}));
  exact("funnelshift", map(words, FunnelShift{}));
  exact_floats("sas", map(floats, Sas{}));
  exact_floats("exp_nonpositive", map(floats, ExpNonpositive{}));
}

// ---- Approximations against double

template <class F>
void approximation(const std::string& name, const std::vector<uint32_t>& in, F f,
                   double (*error)(float x, float y)) {
  const std::vector<uint32_t> out = map(in, f);
  double worst = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const double e = error(as_float(in[i]), as_float(out[i]));
    if (!(e <= worst)) worst = e;
  }
  bound(name, worst);
}

inline double relative(double actual, double expected) {
  if (expected == 0 || std::isinf(expected)) return actual == expected ? 0 : INFINITY;
  return std::fabs(actual - expected) / std::fabs(expected);
}

// Subnormal results may be 0; what rounding of float adds is part of the bounds.
inline double flushed(double y) { return std::fabs(y) < 0x1p-126 ? 0 : y; }

inline void approximations() {
  const std::vector<uint32_t> all = float_patterns();
  std::vector<uint32_t> floats;
  for (const uint32_t x : all) {
    const uint32_t magnitude = x & 0x7fffffffu;
    if (magnitude == 0 || (magnitude >= 0x800000u && magnitude < 0x7f800000u)) floats.push_back(x);
  }
  approximation("exp2_approx", floats, Exp2{}, [](float x, float y) {
    const double expected = flushed(std::exp2(static_cast<double>(x)));
    if (expected > 0x1.fffffep127) return std::isinf(y) ? 0.0 : 2.0;
    // At the edge of the normal numbers either side is right.
    if (expected < 0x1.00001p-126 && y == 0) return 0.0;
    return relative(y, expected) / 0x1p-22;
  });
  approximation("log2_approx", floats, Log2{}, [](float x, float y) {
    if (x < 0) return std::isnan(y) ? 0.0 : 2.0;
    const double expected = std::log2(static_cast<double>(x));
    if (x >= 0.5f && x <= 2) return std::fabs(y - expected) / 0x1p-22;
    return relative(y, expected) / 0x1p-22;
  });
  approximation("rcp_approx", floats, Rcp{}, [](float x, float y) {
    if (x == 0) return std::isinf(y) ? 0.0 : 2.0;
    const double expected = flushed(1.0 / x);
    if (std::fabs(expected) < 0x1.00001p-126 && y == 0) return 0.0;
    return relative(y, expected) / 0x1p-23;
  });
}

}  // namespace wrappers
