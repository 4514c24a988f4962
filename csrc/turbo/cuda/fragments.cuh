// How pages lie in shared memory, and which of their codes a lane of a warp holds.
//
// A warp computes S = Q8 . K8 and O = P8 . V8 with mma.m16n8k32: query rows are the rows of A,
// tokens (for S) or channels (for O) the columns of B. Lane l = 4 * g + t. Which token or channel
// is column g of a B fragment is ours to choose, as long as the two products agree, and so chosen
// that
//   - a lane's codes for four fragments are 16 neighbouring bytes of the block: one load;
//   - the scores that a lane gets, four for each half of a 32-token chunk, are those whose codes it
//     holds in the A fragment of the second product: P never leaves its lane.
//
//   S: column g of fragment i (0..3) of chunk j is token   32 j + 16 (g % 2) + 4 (g / 2) + i,
//      so lane l has, as columns 2t + e,             tokens 32 j + 16 e + 4 t + i
//   O: column g of fragment i of channel block J is channel 32 J + 4 g + i,
//      so lane l has, as columns 2t + e,           channels 32 J + 8 t + 4 e + i
//
// Rows of shared memory are the codes that differ only in token (K) or channel (V). Their padding
// puts the 16-byte loads of any eight neighbouring lanes into different banks.
#pragma once

#include "core/cuda/copy.cuh"
#include "core/cuda/device.cuh"
#include "core/cuda/mma.cuh"
#include "turbo/layout.h"

namespace kvcore::turbo {

constexpr int kChunksOfPage = kPageTokens / kChunk;  // steps of the contraction over tokens
constexpr int kFragments = 4;                        // B fragments that one 16-byte load serves

/// Bytes of a row of K's codes in a block: all tokens of 4 channels (of 8 at 4 bit, 16 at 2 bit).
constexpr int k_row_bytes(int bits) { return (bits == 2 ? kPageTokens / 2 : kPageTokens) * 4; }
/// Lanes t = 0..3 read from four rows, g from slots {0, 4} and on of 16 bytes.
constexpr int k_row_stride(int bits) { return k_row_bytes(bits) + 16; }
/// Rows of `channels` channels of V: lanes t read from four rows, g from neighbouring slots.
constexpr int v_row_stride(int channels) { return channels * kInterleave + 32; }

constexpr int k_rows(int bits, int head_dim) { return bits == 8 ? head_dim / 4 : head_dim / 8; }
constexpr int v_rows(int bits) { return kPageTokens * bits / 32; }

struct LaneIndex {
  int g, t;
};
__device__ inline LaneIndex lane_index() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return {lane / 4, lane % 4};
}

/// Where a lane's codes begin in K's rows and in V's.
template <int kBits>
__device__ inline const uint8_t* k_lane_codes(const uint8_t* rows, LaneIndex lane) {
  return rows + lane.t * k_row_stride(kBits) + lane.g % 2 * 64 + lane.g / 2 * 16;
}
template <int kRowStride>
__device__ inline const uint8_t* v_lane_codes(const uint8_t* rows, LaneIndex lane) {
  return rows + lane.t * kRowStride + lane.g * 16;
}

/// The token of a page that score (j, i, e) of a lane belongs to.
__device__ inline int score_token(LaneIndex lane, int j, int i, int e) {
  return kChunk * j + 16 * e + 4 * lane.t + i;
}
/// The first of the four channels (i = 0..3) of sums (block, e) of a lane.
__device__ inline int sum_channel(LaneIndex lane, int block, int e) {
  return kChunk * block + 8 * lane.t + 4 * e;
}

/// Starts to copy kRows rows; thread counts from 0 to kThreads. All addresses are the thread's own
/// first one plus constants.
template <int kRows, int kRowBytes, int kSmemStride, int kGmemStride, unsigned kThreads>
__device__ __forceinline__ void copy_rows(uint8_t* smem, const uint8_t* gmem, unsigned thread) {
  constexpr unsigned kUnits = kRowBytes / 16;  // of a row
  static_assert(kRowBytes % 16 == 0 && kSmemStride % 16 == 0 && kGmemStride % 16 == 0);
  if constexpr (kUnits > kThreads) {
    static_assert(kUnits % kThreads == 0);
    smem += thread * 16;
    gmem += thread * 16;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (unsigned unit = 0; unit < kUnits; unit += kThreads) {
        cp_async_16(smem + row * kSmemStride + unit * 16, gmem + row * kGmemStride + unit * 16);
      }
    }
  } else {
    constexpr int kAtOnce = kThreads / kUnits;  // rows
    const unsigned own = thread / kUnits, unit = thread % kUnits;
    smem += own * kSmemStride + unit * 16;
    gmem += own * kGmemStride + unit * 16;
#pragma unroll
    for (int row = 0; row < kRows; row += kAtOnce) {
      const bool all = row + kAtOnce <= kRows && kThreads % kUnits == 0;
      if (all || (own < kAtOnce && row + static_cast<int>(own) < kRows)) {
        cp_async_16(smem + row * kSmemStride, gmem + row * kGmemStride);
      }
    }
  }
}

/// The dwords of a 16-byte load.
struct Words {
  uint32_t w[4];
};
__device__ __forceinline__ Words load_words(const uint8_t* smem) {
  const uint4 x = load_16(smem);
  return {{x.x, x.y, x.z, x.w}};
}

// Sums of products start at this int32, the bits of 1.5 * 2^23 as fp32: a sum below 2^22 in size is
// then a float already, and one subtraction makes it a number. The largest is 119 * 119 * 256.
constexpr int32_t kSumBias = 0x4b400000;
constexpr float kSumBiasValue = 0x1.8p23f;
static_assert(119 * 119 * kMaxHeadDim < 1 << 22);

__device__ __forceinline__ float sum_value(int32_t biased) {
  return __int_as_float(biased) - kSumBiasValue;
}

/// One step of a sum of products that starts at `start`.
template <int kA, class B>
__device__ __forceinline__ void mma_step(bool is_first, int32_t (&sum)[4], const uint32_t (&a)[kA],
                                         const B& b, int32_t start) {
  if constexpr (kA == 4) {
    is_first ? mma_m16n8k32_s8(sum, a, b, start) : mma_m16n8k32_s8(sum, a, b);
  } else {
    is_first ? mma_m16n8k16_s8(sum, a, b, start) : mma_m16n8k16_s8(sum, a, b);
  }
}

/// Scores of one lane: [chunk of tokens][fragment][2 h + e], for rows g + 8 h.
struct Scores {
  int32_t s[kChunksOfPage][kFragments][4];
};

}  // namespace kvcore::turbo
