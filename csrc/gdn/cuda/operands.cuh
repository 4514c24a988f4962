// Matrix products of a warp over panels, in bf16 or, for fp32, in tf32.
//
// Columns that become tf32 operands (fragments.cuh) stand for tokens, or channels, in the order 0 4
// 1 5 2 6 3 7: as rows of B they are then in their own order, and come from memory by ldmatrix. In
// which order tokens are columns is free: it is the order of the rows that ldmatrix is given.
#pragma once

#include "gdn/cuda/fragments.cuh"
#include "gdn/cuda/panels.cuh"

namespace kvcore::gdn {

// Products over channels go in steps of 32 bytes of a panel's rows; a product with all tokens, in
// blocks of 16 channels. Every head dim is a multiple of both.
constexpr int kStepUnits = 2;
constexpr int kPanelSteps = kRowUnits / kStepUnits;
constexpr int kBlockChannels = 16;

/// In which order tokens are the columns of tiles.
enum class Order { kNatural, kTf32 };

/// The token of column `column` of a tile; of column 2 t + e it is t + 4 e in the order of tf32.
template <Order kOrder>
__device__ __forceinline__ int tile_token(int column) {
  return kOrder == Order::kNatural ? column : column / 2 + column % 2 * 4;
}
/// The row that a lane gives to ldmatrix for a pair of tiles of tokens as columns.
template <Order kOrder>
__device__ __forceinline__ int pair_token(int pair, int lane) {
  return 16 * pair + lane / 16 * 8 + tile_token<kOrder>(lane % 8);
}
__device__ __forceinline__ int step_offset(int row, int step, int unit) {
  return panel_offset(row, (kStepUnits * step + unit) * kUnitBytes);
}
/// Element e of a tile in lane (g, t), in the order of tf32.
__device__ __forceinline__ int tf32_column(LaneIndex lane, int e) { return lane.t + e % 2 * 4; }

/// bf16 inputs: products with q and k in bf16, those with A and P in tf32.
struct Bf16Operand {
  using Element = BFloat16;
  static constexpr int kPanelChannels = kRowBytes / 2;
  static constexpr int kPanelBlocks = kPanelChannels / kBlockChannels;
  static constexpr int kStepTiles = 2;  // of a state
  static constexpr int kSolveParts = 1;

  /// The channel, of a tile's eight, of a state's element e.
  static __device__ __forceinline__ int state_channel(LaneIndex lane, int e) {
    return 2 * lane.t + e % 2;
  }
  /// Entries of A and P, as they are kept.
  static __device__ __forceinline__ float rounded(float x) { return __uint_as_float(to_tf32(x)); }

  /// [16, 16 channels] or [16, 16 tokens].
  struct A {
    uint32_t r[4];
    A() = default;
    /// Of two tiles.
    __device__ __forceinline__ explicit A(const Tile* d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i] = pack_floats<BFloat16>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
      }
    }
  };
  /// Tokens [row, row + 16) of a step's channels of a panel, as rows.
  static __device__ __forceinline__ A load(int lane, const uint8_t* panel, int row, int step) {
    A a;
    ldmatrix_x4(a.r, panel + step_offset(row + lane % 16, step, lane / 16));
    return a;
  }

  /// Tiles 2 * pair and 2 * pair + 1 += A * (their tokens of a step's channels).
  template <Order kOrder>
  static __device__ __forceinline__ void multiply(int lane, Tile* sums, const A& a,
                                                  const uint8_t* panel, int step, int pair) {
    uint32_t b[4];
    ldmatrix_x4(b, panel + step_offset(pair_token<kOrder>(pair, lane), step, lane / 8 % 2));
    mma_m16n8k16_bf16(sums[2 * pair], a.r, {b[0], b[1]});
    mma_m16n8k16_bf16(sums[2 * pair + 1], a.r, {b[2], b[3]});
  }

  /// [16, tokens of the chunk], in the order of tf32.
  struct TokensA {
    A a[kChunk / 16];
    __device__ __forceinline__ explicit TokensA(const Tile (&u)[kTokenTiles]) {
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) a[i] = A(u + 2 * i);
    }
  };
  /// Tiles of a state's channels += A * (blocks of channels of all tokens), in panels that lie one
  /// behind the other.
  template <int kBlocks>
  static __device__ __forceinline__ void multiply_tokens(int lane, Tile* tiles,
                                                         const TokensA& tokens,
                                                         const uint8_t* panels, int num_blocks) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= num_blocks) break;
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        uint32_t b[4];
        ldmatrix_x4_trans(
            b, panels + value_offset(16 * i + lane / 8 % 2 * 8 + tile_token<Order::kTf32>(lane % 8),
                                     block * kBlockChannels + lane / 16 * 8));
        mma_m16n8k16_bf16(tiles[2 * block], tokens.a[i].r, {b[0], b[1]});
        mma_m16n8k16_bf16(tiles[2 * block + 1], tokens.a[i].r, {b[2], b[3]});
      }
    }
  }

  /// A channel of a token in panels that lie one behind the other.
  static __device__ __forceinline__ int value_offset(int token, int channel) {
    return channel / kPanelChannels * kPanelBytes +
           panel_offset(token, channel % kPanelChannels * 2);
  }
  /// [channels [channel, + 16), tokens [16 pair, + 16)] of such panels, in the order of tf32.
  static __device__ __forceinline__ void load_transposed(int lane, const uint8_t* panels,
                                                         int channel, int pair, Tile (&d)[2]) {
    uint32_t r[4];
    ldmatrix_x4_trans(
        r, panels + value_offset(pair_token<Order::kTf32>(pair, lane), channel + lane / 8 % 2 * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      d[i / 2][i % 2 * 2] = to_float(BFloat16{static_cast<uint16_t>(r[i])});
      d[i / 2][i % 2 * 2 + 1] = to_float(BFloat16{static_cast<uint16_t>(r[i] >> 16)});
    }
  }
};

/// fp32 inputs: everything in tf32, in two parts.
struct Fp32Operand {
  using Element = float;
  static constexpr int kPanelChannels = kRowBytes / 4;
  static constexpr int kPanelBlocks = kPanelChannels / kBlockChannels;
  static constexpr int kStepTiles = 1;
  static constexpr int kSolveParts = 2;

  static __device__ __forceinline__ int state_channel(LaneIndex lane, int e) {
    return tf32_column(lane, e);
  }
  static __device__ __forceinline__ float rounded(float x) { return x; }

  struct A : Tf32A<2> {
    A() = default;
    /// Of one tile.
    __device__ __forceinline__ explicit A(const Tile* d) : Tf32A<2>(*d) {}
  };
  static __device__ __forceinline__ A load(int lane, const uint8_t* panel, int row, int step) {
    uint32_t r[4];
    ldmatrix_x4(r, panel + step_offset(row + lane % 16, step, lane / 16));
    A a;
    a.set(__uint_as_float(r[0]), __uint_as_float(r[1]), __uint_as_float(r[2]),
          __uint_as_float(r[3]));
    return a;
  }

  template <Order kOrder>
  static __device__ __forceinline__ void multiply(int lane, Tile* sums, const A& a,
                                                  const uint8_t* panel, int step, int pair) {
    uint32_t b[4];
    ldmatrix_x4(b, panel + step_offset(pair_token<kOrder>(pair, lane), step, lane / 8 % 2));
    multiply_tf32<2>(sums[2 * pair], a, b[0], b[1]);
    multiply_tf32<2>(sums[2 * pair + 1], a, b[2], b[3]);
  }

  struct TokensA {
    const Tile (&u)[kTokenTiles];
    __device__ __forceinline__ explicit TokensA(const Tile (&u)[kTokenTiles]) : u(u) {}
  };
  template <int kBlocks>
  static __device__ __forceinline__ void multiply_tokens(int lane, Tile* tiles,
                                                         const TokensA& tokens,
                                                         const uint8_t* panels, int num_blocks) {
    const LaneIndex own(lane);
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      __syncwarp();  // or loads of later tiles would fill the registers
      const Tf32A<2> a(tokens.u[i]);
#pragma unroll
      for (int tile = 0; tile < 2 * kBlocks; ++tile) {
        if (tile >= 2 * num_blocks) break;
        // ldmatrix transposes pairs of 16 bits only.
        const auto at = [&](int token) {
          const int row = kTileTokens * i + own.t + token;
          const int channel = 8 * tile + tile_token<Order::kTf32>(own.g);
          return *reinterpret_cast<const uint32_t*>(panels + value_offset(row, channel));
        };
        multiply_tf32<2>(tiles[tile], a, at(0), at(4));
      }
    }
  }

  static __device__ __forceinline__ int value_offset(int token, int channel) {
    return channel / kPanelChannels * kPanelBytes +
           panel_offset(token, channel % kPanelChannels * 4);
  }
  static __device__ __forceinline__ void load_transposed(int lane, const uint8_t* panels,
                                                         int channel, int pair, Tile (&d)[2]) {
    const LaneIndex own(lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = 16 * pair + kTileTokens * i + tf32_column(own, e);
        d[i][e] = *reinterpret_cast<const float*>(panels +
                                                  value_offset(token, channel + own.g + e / 2 * 8));
      }
    }
  }
};

}  // namespace kvcore::gdn
