// Matrix instructions of wrappers.cu.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/cuda/mma.cuh"
#include "wrappers_support.h"

namespace wrappers {

// ---- Matrices

template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* smem = reinterpret_cast<uint32_t*>(dynamic_smem());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) smem[4 * lane + i] = in[4 * lane + i];
  __syncwarp();
  // Rows in another order than that of memory.
  const uint32_t* row = smem + 4 * (lane * 5 % (8 * kMatrices));
  uint32_t r[4] = {};
  if constexpr (kMatrices == 1) kTransposed ? ldmatrix_x1_trans(r[0], row) : ldmatrix_x1(r[0], row);
  if constexpr (kMatrices == 2) {
    uint32_t two[2];
    kTransposed ? ldmatrix_x2_trans(two, row) : ldmatrix_x2(two, row);
    r[0] = two[0];
    r[1] = two[1];
  }
  if constexpr (kMatrices == 4) kTransposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* name) {
  Buffer<uint32_t> in(random_words(128, 11)), out{zeros(128)};
  launch(ldmatrix_kernel<kMatrices, kTransposed>, 1, 32, 512, nullptr,
         static_cast<const uint32_t*>(in.data()), out.data());
  exact(name, out.values());
}

enum class Mma { kS8, kS8Start, kS8Half, kS8HalfStart, kF16, kBf16, kTf32 };

// Per lane: 4 words of A, 2 of B, 4 of the accumulator.
template <Mma kType>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* own = in + 10 * threadIdx.x;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  if constexpr (kType < Mma::kF16) {
    int32_t d[4];
    for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(own[6 + i]);
    const uint32_t half_a[2] = {a[0], a[1]};
    const int32_t start = d[0];
    if constexpr (kType == Mma::kS8) mma_m16n8k32_s8(d, a, b);
    if constexpr (kType == Mma::kS8Start) mma_m16n8k32_s8(d, a, b, start);
    if constexpr (kType == Mma::kS8Half) mma_m16n8k16_s8(d, half_a, b[0]);
    if constexpr (kType == Mma::kS8HalfStart) mma_m16n8k16_s8(d, half_a, b[0], start);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = static_cast<uint32_t>(d[i]);
  } else {
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);
    if constexpr (kType == Mma::kF16) mma_m16n8k16_f16(d, a, b);
    if constexpr (kType == Mma::kBf16) mma_m16n8k16_bf16(d, a, b);
    if constexpr (kType == Mma::kTf32) mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = __float_as_uint(d[i]);
  }
}

template <Mma kType>
std::vector<uint32_t> run_mma(const std::vector<uint32_t>& fragments) {
  Buffer<uint32_t> in(fragments), out{zeros(128)};
  launch(mma_kernel<kType>, 1, 32, 0, nullptr, static_cast<const uint32_t*>(in.data()), out.data());
  return out.values();
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The bits of a float in a format of 16 or 32 bits; x has to fit it.
template <Mma kType>
uint32_t element(float x) {
  const uint32_t bits = float_bits(x);
  if constexpr (kType == Mma::kTf32) return bits;
  if constexpr (kType == Mma::kBf16) return bits >> 16;
  if (x == 0) return 0;
  return (bits >> 16 & 0x8000u) | ((bits >> 13 & 0x3ffffu) - (112u << 10));
}

// Values with few bits, so that every sum is exact whatever its order.
template <Mma kType>
std::vector<uint32_t> float_fragments(uint32_t seed, float scale, int range) {
  const auto value = [&] {
    const int drawn = static_cast<int>(next_random(seed) % (2 * range + 1)) - range;
    return scale * static_cast<float>(drawn);
  };
  std::vector<uint32_t> words(320);
  for (size_t i = 0; i < words.size(); ++i) {
    if (i % 10 >= 6) {
      words[i] = float_bits(value());
    } else if (kType == Mma::kTf32) {
      words[i] = element<kType>(value());
    } else {
      words[i] = element<kType>(value());
      words[i] |= element<kType>(value()) << 16;
    }
  }
  return words;
}

inline double fragment_value(Mma type, uint32_t word, int half) {
  if (type == Mma::kTf32) return as_float(word & 0xffffe000u);
  const uint32_t bits = word >> (16 * half) & 0xffffu;
  if (type == Mma::kBf16) return as_float(bits << 16);
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double mantissa = bits & 1023u;
  if (exponent == 0) return sign * mantissa * 0x1p-24;
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// The error of a sum of K + 1 products is at most that many units of the largest partial sum's
// last place: the hardware aligns and truncates.
template <Mma kType>
void mma_bound(const char* name) {
  constexpr int kPack = kType == Mma::kTf32 ? 1 : 2, kK = 8 * kPack;
  std::vector<uint32_t> in = float_fragments<kType>(99, 0.0078125f, 120);
  const std::vector<uint32_t> out = run_mma<kType>(in);
  double worst = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = as_float(in[10 * lane + 6 + e]), size = std::fabs(sum);
      for (int k = 0; k < kK; ++k) {
        const int half = k / (kK / 2), t = k % (kK / 2) / kPack, i = k % kPack;
        const double a = fragment_value(kType, in[10 * (row % 8 * 4 + t) + row / 8 + 2 * half], i);
        const double b = fragment_value(kType, in[10 * (column * 4 + t) + 4 + half], i);
        sum += a * b;
        size += std::fabs(a * b);
      }
      const double error = std::fabs(as_float(out[4 * lane + e]) - sum);
      worst = std::max(worst, error / (size * (kK + 1) * 0x1p-23));
    }
  }
  bound(name, worst);
}

inline void matrices() {
  ldmatrix<1, false>("ldmatrix_x1");
  ldmatrix<2, false>("ldmatrix_x2");
  ldmatrix<4, false>("ldmatrix_x4");
  ldmatrix<1, true>("ldmatrix_x1_trans");
  ldmatrix<2, true>("ldmatrix_x2_trans");
  ldmatrix<4, true>("ldmatrix_x4_trans");
  const std::vector<uint32_t> words = random_words(320, 5);
  save("mma_s8_in", words.data(), 4 * words.size());
  exact("mma_s8", run_mma<Mma::kS8>(words));  // random accumulators: some sums wrap
  exact("mma_s8_start", run_mma<Mma::kS8Start>(words));
  exact("mma_s8_half", run_mma<Mma::kS8Half>(words));
  exact("mma_s8_half_start", run_mma<Mma::kS8HalfStart>(words));
  const auto halves = float_fragments<Mma::kF16>(6, 0.5f, 15);
  const auto bfloats = float_fragments<Mma::kBf16>(7, 0.5f, 15);
  const auto tf32s = float_fragments<Mma::kTf32>(8, 0.5f, 15);
  save("mma_f16_in", halves.data(), 4 * halves.size());
  save("mma_bf16_in", bfloats.data(), 4 * bfloats.size());
  save("mma_tf32_in", tf32s.data(), 4 * tf32s.size());
  exact("mma_f16", run_mma<Mma::kF16>(halves));
  exact("mma_bf16", run_mma<Mma::kBf16>(bfloats));
  exact("mma_tf32", run_mma<Mma::kTf32>(tf32s));
  mma_bound<Mma::kF16>("mma_f16_bound");
  mma_bound<Mma::kBf16>("mma_bf16_bound");
  mma_bound<Mma::kTf32>("mma_tf32_bound");
}

}  // namespace wrappers
