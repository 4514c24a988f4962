// O += weight * (P8 . V8) for a page.
#pragma once

#include "turbo/cuda/fragments.cuh"
#include "turbo/cuda/softmax.cuh"

namespace kvcore::turbo {

/// A lane's part of O for the rows of a tile: [channel block][fragment][2 h + e], row g + 8 h.
template <int kHeadDim, int kHalves>
struct Outputs {
  static constexpr int kBlocks = kHeadDim / kChunk;
  float o[kBlocks][kFragments][2 * kHalves];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
#pragma unroll
        for (int c = 0; c < 2 * kHalves; ++c) o[block][i][c] = 0.0f;
      }
    }
  }

  /// All 32 lanes together. Late in a row its maximum hardly ever moves, and nothing is done.
  __device__ __forceinline__ void scale(const float (&decay)[kHalves]) {
    bool moved = false;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) moved |= decay[h] != 1.0f;
    if (!__any_sync(kAllLanes, moved)) return;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
#pragma unroll
        for (int c = 0; c < 2 * kHalves; ++c) o[block][i][c] *= decay[c / 2];
      }
    }
  }
};

/// 8 bit, channel blocks [kBegin, kEnd). `codes`: v_lane_codes of the first row of block kBegin.
template <int kBegin, int kEnd, int kRowStride, int kHeadDim, int kHalves>
__device__ __forceinline__ void add_values8(const uint8_t* codes, float v_scale,
                                            const PageWeights<kHalves>& page,
                                            Outputs<kHeadDim, kHalves>& outputs) {
  float weight[kHalves];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) weight[h] = page.weight[h] * v_scale;
#pragma unroll
  for (int block = kBegin; block < kEnd; ++block) {
    int32_t sum[kFragments][4];
#pragma unroll
    for (int j = 0; j < kChunksOfPage; ++j) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const uint32_t p8[2] = {page.p8[j][2 * second], page.p8[j][2 * second + 1]};
        const Words v8 =
            load_words(codes + (8 * j + 4 * second) * kRowStride + (block - kBegin) * 128);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          mma_step(j + second == 0, sum[i], p8, v8.w[i], kSumBias);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int c = 0; c < 2 * kHalves; ++c) {
        float& o = outputs.o[block][i][c];
        o = __fmaf_rn(weight[c / 2], sum_value(sum[i][c]), o);
      }
    }
  }
}

/// 4 or 2 bit. V is never rebuilt: sum P (q step + zero) = step sum(P q) + zero sum(P), in int32.
/// `codes`: v_lane_codes of the first row; `steps`, `zeros`: of channel 0.
template <int kBits, int kHeadDim, int kHalves>
__device__ __forceinline__ void add_narrow_values(const uint8_t* codes, const uint8_t* steps,
                                                  const uint8_t* zeros, LaneIndex lane,
                                                  float v_scale, const PageWeights<kHalves>& page,
                                                  Outputs<kHeadDim, kHalves>& outputs) {
  constexpr int kRowStride = v_row_stride(kHeadDim);
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  float weight[kHalves];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) weight[h] = page.weight[h] * v_scale;
  // Sums of P8 by a product with ones: every column holds them, and no lane has to ask another.
  int32_t p_sum[4];
#pragma unroll
  for (int j = 0; j < kChunksOfPage; ++j) {
    const uint32_t ones[2] = {0x01010101u, 0x01010101u};
    mma_step(j == 0, p_sum, page.p8[j], ones, 0);
  }
#pragma unroll
  for (int block = 0; block < kHeadDim / kChunk; ++block) {
    Words x[kBits / 2];
#pragma unroll
    for (int j = 0; j < kBits / 2; ++j) {
      x[j] = load_words(codes + 4 * j * kRowStride + block * 128);
    }
    uint2 step, zero;  // eight channels of a lane: e = 0, 1
    const int channel = sum_channel(lane, block, 0);
    step = *reinterpret_cast<const uint2*>(steps + channel);
    zero = *reinterpret_cast<const uint2*>(zeros + channel);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      int32_t sum[4];
#pragma unroll
      for (int j = 0; j < kChunksOfPage; ++j) {
        const uint32_t q = kBits == 4 ? x[j % (kBits / 2)].w[i] : x[0].w[i] >> (4 * j);
        const uint32_t v[2] = {q & kMask, q >> kBits & kMask};
        mma_step(j == 0, sum, page.p8[j], v, 0);
      }
#pragma unroll
      for (int c = 0; c < 2 * kHalves; ++c) {
        const uint32_t step_word = c % 2 == 0 ? step.x : step.y;
        const uint32_t zero_word = c % 2 == 0 ? zero.x : zero.y;
        const int32_t step_i = static_cast<int32_t>(step_word >> (8 * i) & 0xff);
        const int32_t zero_i = static_cast<int8_t>(zero_word >> (8 * i));
        const int32_t value = step_i * sum[c] + (zero_i * p_sum[c - c % 2] + kSumBias);
        float& o = outputs.o[block][i][c];
        o = __fmaf_rn(weight[c / 2], sum_value(value), o);
      }
    }
  }
}

}  // namespace kvcore::turbo
