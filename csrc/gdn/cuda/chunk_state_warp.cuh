// The serial part of the scan, for 16 value channels: what a warp does with a chunk once its tiles
// are in shared memory. This is what another instruction set would replace.
//
// The warp holds S^T [16, k_dim] as fp32 sums, and everything else transposed too: value channels
// are the rows of all its products, and tokens or key channels their columns. So K, Q, A and P are
// B fragments as they lie in memory, each product's sums are the A fragments of the next, and no
// value ever leaves the warp.
#pragma once

#include "gdn/cuda/chunk_scan_args.cuh"
#include "gdn/cuda/heuristics.h"
#include "gdn/cuda/operands.cuh"

namespace kvcore::gdn {

/// What a chunk needs between reading and writing the state.
template <class Operand>
struct SolveTiles {
  static constexpr int kValuePanels =
      kSliceColumns * static_cast<int>(sizeof(typename Operand::Element)) / kRowBytes;
  alignas(1024) uint8_t values[kValuePanels][kPanelBytes];  // v of the CTA's channels; then out
  alignas(1024) ChunkRecord record;                         // a and p swizzled as panels are
  volatile float one;
};

template <class Operand, int kMaxDim>
class StateWarp {
 public:
  using T = typename Operand::Element;

  /// Key channels [0, k_dim) and value channels from `column` on of a state, or zeros.
  __device__ void load_state(int lane_idx, const float* state, bool v_first, int k_dim, int v_dim,
                             int column) {
#pragma unroll
    for (int tile = 0; tile < kMaxDim / 8; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state_[tile][e] = 0.0f;
      if (state == nullptr || 8 * tile >= k_dim) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        state_[tile][e] = state[state_index(lane_idx, tile, e, v_first, k_dim, v_dim, column)];
      }
    }
  }
  __device__ void store_state(int lane_idx, float* state, bool v_first, int k_dim, int v_dim,
                              int column) const {
#pragma unroll
    for (int tile = 0; tile < kMaxDim / 8; ++tile) {
      if (8 * tile >= k_dim) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        state[state_index(lane_idx, tile, e, v_first, k_dim, v_dim, column)] = state_[tile][e];
      }
    }
  }

  __device__ void begin_chunk() {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) w_[tile][e] = out_[tile][e] = 0.0f;
    }
  }

  /// K S and Q S, the panel's channels.
  template <int kPanel>
  __device__ void read(int lane, const uint8_t* k, const uint8_t* q, int k_dim) {
#pragma unroll
    for (int i = 0; i < kPanelSteps; ++i) {
      const int tile = (kPanel * kPanelSteps + i) * Operand::kStepTiles;
      if (8 * tile >= k_dim) break;
      const typename Operand::A a(state_ + tile);
#pragma unroll
      for (int pair = 0; pair < kTokenTiles / 2; ++pair) {
        hold_loads();
        Operand::template multiply<Order::kTf32>(lane, w_, a, k, i, pair);
        Operand::template multiply<Order::kTf32>(lane, out_, a, q, i, pair);
      }
    }
  }

  /// W, U and out, which takes the place of the warp's values; then U is ready to be written to the
  /// state. `parked` is the thread's of kTokenTiles places, kStateThreads apart, in shared memory.
  __device__ void solve(int lane_idx, SolveTiles<Operand>& tiles, int column, float4* parked) {
    const ChunkRecord& record = tiles.record;
#pragma unroll
    for (int pair = 0; pair < kTokenTiles / 2; ++pair) {
      hold_loads();
      const LaneIndex lane(lane_idx);
      Tile v[2];
      Operand::load_transposed(lane_idx, tiles.values[0], column, pair, v);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int tile = 2 * pair + i;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = kTileTokens * tile + tf32_column(lane, e);
          w_[tile][e] = __fmaf_rn(record.read[token], w_[tile][e], v[i][e]);
          out_[tile][e] *= record.out[token];
        }
        if constexpr (kParksOut) {
          const Tile& out = out_[tile];
          parked[tile * kStateThreads] = make_float4(out[0], out[1], out[2], out[3]);
        }
      }
    }
    // U in the place of W: later tokens first, since they need the W of earlier ones.
    solve_tiles<kTokenTiles - kSolveTiles>(lane_idx, tiles);
    __syncwarp();  // all lanes have their values
    finish_out<0>(lane_idx, tiles, column, parked);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      hold_loads();
      const LaneIndex lane(lane_idx);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w_[tile][e] *= record.write[kTileTokens * tile + tf32_column(lane, e)];
      }
    }
    decay_ = record.decay;
  }

  /// Out of the chunk's first num_tokens tokens, from the place of the warp's values.
  __device__ void store_out(int lane_idx, SolveTiles<Operand>& tiles, int column,
                            const OutputView& out, int64_t first, int64_t token_stride,
                            int64_t num_tokens) const {
    __syncwarp();
    constexpr int kUnits = kWarpColumns * static_cast<int>(sizeof(T)) / kUnitBytes;
    constexpr int kElements = kUnitBytes / static_cast<int>(sizeof(T));
    const int channel = column + lane_idx % kUnits * kElements;
#pragma unroll
    for (int row = 0; row < kChunk; row += kWarpSize / kUnits) {
      const int token = row + lane_idx / kUnits;
      hold_loads();
      if (token >= num_tokens) continue;
      const int64_t at = first + token * token_stride + channel;
      const T* const values = &value_at(tiles, token, channel);
      if (out.dtype == DtypeOf<T>::value) {
        store_16(static_cast<T*>(out.data) + at, load_16(values));
      } else {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = to_float(values[i]);
        store_channels(static_cast<Half*>(out.data) + at, 0, x);
      }
    }
  }

  /// Before panels are written.
  __device__ void decay_state() {
#pragma unroll
    for (int tile = 0; tile < kMaxDim / 8; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state_[tile][e] *= decay_;
    }
  }

  /// The state's channels of two panels of k, of which there may be only one.
  template <int kPanel>
  __device__ void write(int lane, const SolveTiles<Operand>& tiles, const uint8_t* k, int k_dim) {
    constexpr int kFirst = kPanel * Operand::kPanelBlocks;
    constexpr int kLast = kMaxDim / kBlockChannels;
    constexpr int kBlocks =
        kLast - kFirst < 2 * Operand::kPanelBlocks ? kLast - kFirst : 2 * Operand::kPanelBlocks;
    renew(tiles, kTokenTiles);
    const typename Operand::TokensA u(w_);
    Operand::template multiply_tokens<kBlocks>(lane, state_ + 2 * kFirst, u, k,
                                               k_dim / kBlockChannels - kFirst);
  }

 private:
  // With more than 128 key channels the state leaves no registers for both W and out: while U is
  // computed out lies in shared memory, from where a half of it comes at once.
  static constexpr bool kParksOut = kMaxDim > 128;
  static constexpr int kOutTiles = kParksOut ? kTokenTiles / 2 : kTokenTiles;
  // Sums of U at once: independent chains of products, as many as registers are left for.
  static constexpr int kSolveTiles = kParksOut ? 2 : 4;

  /// Loads that follow do not move up before it. Where registers are scarce, the compiler would
  /// fill them with operands of later products, and spill others.
  static __device__ __forceinline__ void hold_loads() {
    if constexpr (kMaxDim > 128 || Operand::kSolveParts == 2) __syncwarp();
  }

  /// The first tiles of w_, times a one of which the compiler does not know. It would otherwise
  /// keep the parts of tiles that are operands more than once, and spill others.
  __device__ __forceinline__ void renew(const SolveTiles<Operand>& tiles, int count) {
    if constexpr (kMaxDim > 128 && Operand::kSolveParts == 2) {
      const float one = tiles.one;
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        if (tile >= count) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) w_[tile][e] *= one;
      }
    }
  }

  /// Where an element of the lane's lies in a state in memory, which has less than 2^31.
  static __device__ __forceinline__ int state_index(int lane_idx, int tile, int e, bool v_first,
                                                    int k_dim, int v_dim, int column) {
    const LaneIndex lane(lane_idx);
    const int k = 8 * tile + Operand::state_channel(lane, e), v = column + lane.g + e / 2 * 8;
    return v_first ? v * k_dim + k : k * v_dim + v;
  }

  /// Sums of tokens [16 pair, + 16) += A * (entries of these rows of a triangle, columns [8 j, +
  /// 8))^T.
  __device__ __forceinline__ void multiply_triangle(int lane, Tile* sums,
                                                    const Tf32A<Operand::kSolveParts>& a,
                                                    const float* triangle, int pair, int j) const {
    const int row = 16 * pair + lane / 16 * 8 + tile_token<Order::kTf32>(lane % 8);
    uint32_t b[4];
    ldmatrix_x4(b, reinterpret_cast<const uint8_t*>(triangle) +
                       panel_offset(triangle_row(row, j), (j % 4 * 2 + lane / 8 % 2) * kUnitBytes));
    // Above the diagonal there are zeros, which times infinity would be NaN.
    if (2 * pair >= j) multiply_tf32<Operand::kSolveParts>(sums[0], a, b[0], b[1]);
    multiply_tf32<Operand::kSolveParts>(sums[1], a, b[2], b[3]);
  }

  /// Tiles [kFirst, kFirst + kSolveTiles) of U, and then those before.
  template <int kFirst>
  __device__ __forceinline__ void solve_tiles(int lane, const SolveTiles<Operand>& tiles) {
    renew(tiles, kFirst + kSolveTiles);
    Tile sum[kSolveTiles] = {};
#pragma unroll
    for (int j = 0; j < kFirst + kSolveTiles; ++j) {
      hold_loads();
      const Tf32A<Operand::kSolveParts> a(w_[j]);
#pragma unroll
      for (int i = 0; i < kSolveTiles; i += 2) {
        if (kFirst + i + 1 >= j)
          multiply_triangle(lane, sum + i, a, tiles.record.a, (kFirst + i) / 2, j);
      }
    }
#pragma unroll
    for (int i = 0; i < kSolveTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) w_[kFirst + i][e] = sum[i][e];
    }
    if constexpr (kFirst > 0) solve_tiles<kFirst - kSolveTiles>(lane, tiles);
  }

  /// Tiles [kFirst, kFirst + kOutTiles) of out += P U, to the place of the values, and those
  /// behind.
  template <int kFirst>
  __device__ __forceinline__ void finish_out(int lane_idx, SolveTiles<Operand>& tiles, int column,
                                             const float4* parked) {
    renew(tiles, kFirst + kOutTiles);
    if constexpr (kParksOut) {
#pragma unroll
      for (int tile = kFirst; tile < kFirst + kOutTiles; ++tile) {
        const float4 x = parked[tile * kStateThreads];
        out_[tile][0] = x.x;
        out_[tile][1] = x.y;
        out_[tile][2] = x.z;
        out_[tile][3] = x.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kFirst + kOutTiles; ++j) {
      hold_loads();
      const Tf32A<Operand::kSolveParts> a(w_[j]);
#pragma unroll
      for (int i = 0; i < kOutTiles; i += 2) {
        if (kFirst + i + 1 < j) continue;
        multiply_triangle(lane_idx, out_ + kFirst + i, a, tiles.record.p, (kFirst + i) / 2, j);
      }
    }
    const LaneIndex lane(lane_idx);
#pragma unroll
    for (int tile = kFirst; tile < kFirst + kOutTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = kTileTokens * tile + tf32_column(lane, e);
        value_at(tiles, token, column + lane.g + e / 2 * 8) = from_float<T>(out_[tile][e]);
      }
    }
    if constexpr (kFirst + kOutTiles < kTokenTiles) {
      finish_out<kFirst + kOutTiles>(lane_idx, tiles, column, parked);
    }
  }

  /// A value channel of the CTA's, of a token.
  static __device__ __forceinline__ T& value_at(SolveTiles<Operand>& tiles, int token,
                                                int channel) {
    return *reinterpret_cast<T*>(tiles.values[0] + Operand::value_offset(token, channel));
  }

  Tile state_[kMaxDim / 8];
  Tile w_[kTokenTiles];  // K S, then W, then U, then U as it is written
  Tile out_[kTokenTiles];
  float decay_;
};

}  // namespace kvcore::gdn
