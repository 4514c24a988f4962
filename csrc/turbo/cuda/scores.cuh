// S += Q8 . K8 for a chunk of 32 channels of a page.
#pragma once

#include "core/cuda/packed.cuh"
#include "turbo/cuda/fragments.cuh"

namespace kvcore::turbo {

/// 8 bit. is_first: of the chunks. `codes`: k_lane_codes of the chunk's first row. The two halves
/// of the chunk are steps of their own: the words of a load are then operands where they are.
__device__ __forceinline__ void add_scores8(bool is_first, const uint8_t* codes,
                                            const uint32_t (&q8)[4], Scores& scores) {
  const uint32_t low_q8[2] = {q8[0], q8[1]}, high_q8[2] = {q8[2], q8[3]};
#pragma unroll
  for (int j = 0; j < kChunksOfPage; ++j) {
    const Words low = load_words(codes + j * 128);
    const Words high = load_words(codes + 4 * k_row_stride(8) + j * 128);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      mma_step(is_first, scores.s[j][i], low_q8, low.w[i], kSumBias);
      mma_step(false, scores.s[j][i], high_q8, high.w[i], 0);
    }
  }
}

// Narrow K is rebuilt as int8, four channels at a time, in fp16 arithmetic that is exact because it
// is integer arithmetic: the fp16 with bits n <= 2047 has the value n * 2^-24, so that with codes q
// and with 1536 + zero as raw bits, q * step + (1536 + zero) comes out as raw bits as well, and
// its low byte is the wanted int8. Folding step into Q instead would need 16-bit operands, twice
// the matrix instructions, and new A fragments for each page.

/// Steps (as fp16 values) and 1536 + zeros (as bits) of four channels; even and odd ones apart, two
/// in a register.
struct Levels {
  uint32_t even_step, odd_step, even_zero, odd_zero;
};

constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

/// kShift: the codes will be kShift bits too high, so the steps are made smaller by as much.
template <int kShift>
__device__ __forceinline__ Levels make_levels(uint32_t step, uint32_t zero) {
  // A step's byte below 0x64 is the fp16 1024 + step.
  constexpr uint32_t kScale = twice(0x3c00 - (kShift << 10));   // 2^-kShift
  constexpr uint32_t kOffset = twice(0xe400 - (kShift << 10));  // -1024 * 2^-kShift
  constexpr uint32_t kZero = twice(1536 - 128);
  const uint32_t biased = zero ^ 0x80808080u;  // zero + 128
  return {fma_f16x2(__byte_perm(step, 0x64646464u, 0x4240), kScale, kOffset),
          fma_f16x2(__byte_perm(step, 0x64646464u, 0x4341), kScale, kOffset),
          (biased & 0x00ff00ffu) + kZero, (biased >> 8 & 0x00ff00ffu) + kZero};
}

/// q * step + zero of the four codes that lie kShift bits up in each byte; odd is codes >> 8.
template <int kBits, int kShift>
__device__ __forceinline__ uint32_t rebuild(uint32_t codes, uint32_t odd, const Levels& levels) {
  constexpr uint32_t kMask = twice(((1u << kBits) - 1) << kShift);
  return __byte_perm(fma_f16x2(codes & kMask, levels.even_step, levels.even_zero),
                     fma_f16x2(odd & kMask, levels.odd_step, levels.odd_zero), 0x6240);
}

/// 4 or 2 bit. `steps`, `zeros`: of the chunk's first channel.
template <int kBits>
__device__ __forceinline__ void add_narrow_scores(bool is_first, const uint8_t* codes,
                                                  const uint8_t* steps, const uint8_t* zeros,
                                                  LaneIndex lane, const uint32_t (&q8)[4],
                                                  Scores& scores) {
  const auto word = [&](const uint8_t* bytes, int second) {
    return *reinterpret_cast<const uint32_t*>(bytes + 4 * lane.t + 16 * second);
  };
  const Levels first = make_levels<0>(word(steps, 0), word(zeros, 0));
  const Levels second = make_levels<kBits>(word(steps, 1), word(zeros, 1));
  const auto add = [&](uint32_t x, int32_t (&s)[4]) {
    const uint32_t odd = x >> 8;
    const uint32_t k8[2] = {rebuild<kBits, 0>(x, odd, first),
                            rebuild<kBits, kBits>(x, odd, second)};
    mma_step(is_first, s, q8, k8, kSumBias);
  };
  if constexpr (kBits == 4) {
#pragma unroll
    for (int j = 0; j < kChunksOfPage; ++j) {
      const Words x = load_words(codes + j * 128);
#pragma unroll
      for (int i = 0; i < kFragments; ++i) add(x.w[i], scores.s[j][i]);
    }
  } else {
    const Words x = load_words(codes);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      add(x.w[i], scores.s[0][i]);
      add(x.w[i] >> 4, scores.s[1][i]);
    }
  }
}

}  // namespace kvcore::turbo
