// How a CTA works on one page of a head: head_dim threads, a warp on each chunk of 32 channels, a
// thread on a tile of 16 tokens x 4 channels.
//
//               channels 4g .. 4g+3 of the chunk, g = lane / 4
//             g = 0            1            ...           7
//   tokens  0 lane 0         lane 4                    lane 28
//     ..   16 lane 1         lane 5                    lane 29
//     ..   32 lane 2         lane 6                    lane 30
//     ..   48 lane 3         lane 7                    lane 31
//
// Everything that codes of a channel are compared with, and every code that shares a byte with
// another (layout.h), is then in the same warp: stage 2 needs shuffles alone, no shared memory, and
// each thread writes whole units of 16 bytes of the block. A row of a warp is 64 bytes of 16-bit
// values, whole sectors, so loads of 8 bytes a thread waste none.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/rows.cuh"
#include "turbo/cuda/store.cuh"

namespace kvcore::turbo {

constexpr int kTileTokens = 16;
constexpr int kTileChannels = 4;
constexpr int kTileQuarters = kPageTokens / kTileTokens;
static_assert(kTileChannels == kInterleave && kTileQuarters == 4 && kChunk == 32);

/// The smallest normal number: an all-zero page needs no special case.
constexpr float kMinScale = 0x1p-126f;

/// Which part of the page is this thread's.
struct TilePlace {
  int group;    // channels [4 * group, 4 * group + 4)
  int quarter;  // tokens [16 * quarter, 16 * quarter + 16)

  __device__ int channel() const { return group * kTileChannels; }
  __device__ int token() const { return quarter * kTileTokens; }
};
__device__ inline TilePlace tile_place() {
  return {static_cast<int>(threadIdx.x) / kTileQuarters,
          static_cast<int>(threadIdx.x) % kTileQuarters};
}

/// Adding it to |x| < 2^22 rounds x to an integer, ties to even, whose low byte is that of the sum.
constexpr float kRounder = 0x1.8p23f;
__device__ inline float round_even(float x) { return (x + kRounder) - kRounder; }

/// Four bytes from the low bytes of four words.
__device__ inline uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
/// Byte j of a word as 2^23 + byte, which is exact: a conversion would take a slower unit.
__device__ inline float biased_byte(uint32_t word, int j) {
  return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7650 + j));
}

/// The scale that maps amax to the largest code.
__device__ inline float code_scale(float amax) {
  const float scale = amax / kCodeMax;
  return scale > kMinScale ? scale : kMinScale;
}

/// Values of a tile.
struct RowTile {
  float x[kTileTokens][kTileChannels];
};
/// Codes of a tile: a word per token, a byte per channel.
struct CodeTile {
  uint32_t word[kTileTokens];
};

/// The calibration of this thread's channels: K is stored as (k - mean) / balance.
struct TileCalibration {
  float mean[kTileChannels], balance[kTileChannels];
  bool subtracts, divides;

  /// Of a head, [head_dim]; null for what is not done.
  __device__ TileCalibration(const float* head_mean, const float* head_balance)
      : subtracts(head_mean != nullptr), divides(head_balance != nullptr) {
    const int channel = tile_place().channel();
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      mean[j] = subtracts ? head_mean[channel + j] : 0;
      balance[j] = divides ? head_balance[channel + j] : 1;
    }
  }

  __device__ void apply(float (&x)[kTileChannels]) const {
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      if (subtracts) x[j] -= mean[j];
      if (divides) x[j] /= balance[j];
    }
  }
};

/// A whole page whose first token is the row at an element offset.
template <class T>
__device__ inline RowTile load_tile(const DeviceRows& rows, int64_t offset,
                                    const TileCalibration& calibration) {
  const TilePlace place = tile_place();
  RowTile tile;
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    load_channels<T>(rows, offset + (place.token() + i) * rows.token_stride, place.channel(),
                     tile.x[i]);
  }
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) calibration.apply(tile.x[i]);
  return tile;
}

/// Calls f(token, x) in turn for this thread's part of the tokens [first, last) of such a page;
/// only those rows need exist. kRows loads are under way at a time.
template <class T, int kRows, class F>
__device__ inline void for_each_row(const DeviceRows& rows, int64_t offset, int first, int last,
                                    const TileCalibration& calibration, const F& f) {
  const TilePlace place = tile_place();
  const int begin = max(first, place.token()), end = min(last, place.token() + kTileTokens);
#pragma unroll 1
  for (int token = begin; token < end; token += kRows) {
    float x[kRows][kTileChannels];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (token + i >= end) break;
      load_channels<T>(rows, offset + (token + i) * rows.token_stride, place.channel(), x[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (token + i >= end) break;
      calibration.apply(x[i]);
      f(token + i, x[i]);
    }
  }
}

/// What matters of the values of a page.
struct Magnitude {
  float amax = 0;                     // of the finite ones
  int first_nonfinite = kPageTokens;  // first token with one that is not, kPageTokens without one

  __device__ void add(int token, const float (&x)[kTileChannels]) {
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      const float size = fabsf(x[j]);
      const bool finite = size < INFINITY;
      amax = finite ? fmaxf(amax, size) : amax;
      first_nonfinite = finite ? first_nonfinite : min(first_nonfinite, token);
    }
  }
};

/// Shared memory of page_magnitude(): one for each warp, twice.
constexpr int kMaxWarps = kMaxHeadDim / kWarpSize;
constexpr int kMagnitudeBytes = 2 * kMaxWarps * sizeof(Magnitude);

/// That of the page from those of all threads, a barrier of the head_dim threads that work on it.
/// Calls with an even and an odd turn alternate, so that none writes what another still reads.
__device__ inline Magnitude page_magnitude(Magnitude own, int head_dim, int turn) {
  own.amax = warp_max(own.amax);
  own.first_nonfinite = warp_min(own.first_nonfinite);
  Magnitude* smem = reinterpret_cast<Magnitude*>(dynamic_smem()) + turn % 2 * kMaxWarps;
  if (threadIdx.x % kWarpSize == 0) smem[threadIdx.x / kWarpSize] = own;
  __syncthreads();
  for (int warp = 0; warp < head_dim / kWarpSize; ++warp) {
    own.amax = fmaxf(own.amax, smem[warp].amax);
    own.first_nonfinite = min(own.first_nonfinite, smem[warp].first_nonfinite);
  }
  return own;
}
__device__ inline Magnitude page_magnitude(const RowTile& tile, int head_dim, int turn) {
  Magnitude own;
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) own.add(tile_place().token() + i, tile.x[i]);
  return page_magnitude(own, head_dim, turn);
}

/// Stage 1 under a scale of the page's own: |x / scale| <= kCodeMax up to rounding. Codes are 0
/// under NaN.
__device__ inline CodeTile quantize_tile(const RowTile& tile, float scale) {
  CodeTile codes;
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    uint32_t code[kTileChannels];
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      code[j] = scale == scale ? __float_as_uint(tile.x[i][j] / scale + kRounder) : 0;
    }
    codes.word[i] = pack_bytes(code[0], code[1], code[2], code[3]);
  }
  return codes;
}

/// Codes of four values of a token, clamped, under a scale that may be too small; counts those that
/// it is too small for. 0 for what is not finite.
__device__ inline uint32_t clamped_codes(const float (&x)[kTileChannels], float scale,
                                         int& clamped) {
  uint32_t code[kTileChannels];
#pragma unroll
  for (int j = 0; j < kTileChannels; ++j) {
    const float finite = fabsf(x[j]) < INFINITY ? x[j] : 0;
    // Bounded before it is rounded, which takes no huge value; 120 is clamped as they would be.
    const float bound = kCodeMax + 1;
    const float rounded = round_even(fminf(fmaxf(finite / scale, -bound), bound));
    clamped += fabsf(rounded) > kCodeMax;
    const float code_max = kCodeMax;
    code[j] = __float_as_uint(fminf(fmaxf(rounded, -code_max), code_max) + kRounder);
  }
  return pack_bytes(code[0], code[1], code[2], code[3]);
}

}  // namespace kvcore::turbo
