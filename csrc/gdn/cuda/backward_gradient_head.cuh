// One value head of a chunk, for the kernel of backward_gradient_kernel.cuh. Numbers in comments
// are those of the equations in csrc/gdn/README.md.
#pragma once

#include "core/cuda/reduce.cuh"
#include "gdn/cuda/backward_args.cuh"

namespace kvcore::gdn::backward {

struct GradientSmem {
  float slots[kGradientSlots][kSquareFloats];
  float scores[kSquareFloats];  // scale D * dP
  float square[kSquareFloats];  // F = dX diag(beta) X^T, then N
  TokenScalars tokens;
  float columns[2][kWarps][kChunk];  // sums over a warp's rows of Z, and of X * dX
  float dG[kChunk], dbeta[kChunk];
  float sums[kWarps];
};
static_assert(sizeof(TokenScalars) <= kBackwardThreads * kUnitBytes);
static_assert(sizeof(GradientSmem) <= kPortableSmemBytes);

/// Sums over rows g and g + 8, of a lane's share of columns.
struct RowSums {
  float dG[2] = {}, dbeta[2] = {};
  float kept = 0.0f;    // 6: of K * r (U dS^T), over all rows
  float states = 0.0f;  // 6: <S, dS>
};

/// Sum of a tile's column pair over the 16 rows of a warp, to its place; first: for the first time.
__device__ __forceinline__ void add_columns(float* columns, int n, float (&x)[2], bool first) {
  const LaneIndex lane = lane_of_warp();
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) {
      x[e] += __shfl_xor_sync(kAllLanes, x[e], distance);
    }
    float& sum = columns[column_of(lane, n, e)];
    if (lane.g == 0) sum = first ? x[e] : sum + x[e];
  }
}

/// One value head of a chunk.
template <int kParts>
struct GradientHead {
  const BackwardArgs& a;
  GradientSmem& smem;
  const Chunk& chunk;
  int64_t head, k_head, index;  // index: in the window's arrays
  int warp;

  __device__ float decay(int i, int j) const {
    return past_decay(j <= i, smem.tokens.G[i], smem.tokens.G[j]);
  }
  __device__ Block d_out_block(int block) const {
    return token_block(a, a.d_out, chunk, a.p.sizes.v_heads, head, dim_v(a), block);
  }

  /// Tiles of the warp's rows: of a block in memory, of a square in shared memory.
  __device__ auto from(const Block& block) const {
    return [block, this](int n, Tile& tile) { load_tile(block, warp, n, tile); };
  }
  template <bool kTransposed>
  __device__ auto from(const float* square) const {
    return [square, this](int n, Tile& tile) { read_tile<kTransposed>(square, warp, n, tile); };
  }
  /// f(n, e, i, j) for every element of the lane's rows.
  template <class F>
  __device__ void each_element(const F& f) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const LaneIndex lane = lane_of_warp();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(n, e, 16 * warp + row_of(lane, e), column_of(lane, n, e));
      }
    }
  }

  /// 1: dP; 5: its part of Z. scale D * dP goes to shared memory.
  template <class R>
  __device__ void scores(R& ring, RowSums& sums) {
    Rows d;
    clear(d);
    for (int block = 0; block < blocks_of(dim_v(a)); ++block) {
      const float* const u = ring.next();
      multiply_tiles<kParts, RowsAre::kColumns>(d, from(d_out_block(block)), u,
                                                tiles_in(dim_v(a), block), kTiles);
    }
    const Block p = square_block(a.p_scores, index);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Tile scores;
      load_tile(p, warp, n, scores);
      const LaneIndex lane = lane_of_warp();
      float column_sums[2] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * warp + row_of(lane, e), j = column_of(lane, n, e);
        const float dp = j <= i ? d[n][e] : 0.0f, z = scores[e] * dp;
        sums.dG[e / 2] += z;
        column_sums[e % 2] += z;
        smem.scores[i * kStride + j] = dp * a.p.scale * decay(i, j);
      }
      add_columns(smem.columns[0][warp], n, column_sums, true);
    }
  }

  /// 1: dA; 5: its part of Z; 4: dX, of which dX diag(beta) is left in d.
  template <class R>
  __device__ void inverse_gradient(R& ring, RowSums& sums, Rows& d) {
    clear(d);
    for (int block = 0; block < blocks_of(dim_v(a)); ++block) {
      const float* const w = ring.next();
      multiply_tiles<kParts, RowsAre::kColumns>(d, from(value_block(a, a.du, index, block)), w,
                                                tiles_in(dim_v(a), block), kTiles);
    }
    const Block x = inverse_block(a, chunk, head);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Tile inverse;
      load_tile(x, warp, n, inverse);
      const LaneIndex lane = lane_of_warp();
      float z_sums[2] = {}, x_sums[2] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * warp + row_of(lane, e), j = column_of(lane, n, e);
        const float beta = smem.tokens.beta[j];
        const float dx = j <= i ? d[n][e] * decay(i, j) : 0.0f;
        const float weighted = inverse[e] * dx;  // X * dX; A * dA is that times beta
        sums.dG[e / 2] += weighted * beta;
        z_sums[e % 2] += weighted * beta;
        x_sums[e % 2] += weighted;
        d[n][e] = dx * beta;
      }
      add_columns(smem.columns[0][warp], n, z_sums, false);
      add_columns(smem.columns[1][warp], n, x_sums, true);
    }
  }

  /// 4: dL, and of it dbeta and N, which goes to shared memory.
  template <class R>
  __device__ void system(R& ring, RowSums& sums, Rows& d) {
    Rows dl;
    const float* const x = ring.next();
    clear(dl);
    multiply<kParts, RowsAre::kColumns>(dl, d, x, kTiles, kTiles);
    write_rows(dl, warp, smem.square);
    __syncthreads();
    clear(dl);
    multiply_tiles<kParts, RowsAre::kInner>(dl, from<true>(x), smem.square, kTiles, kTiles);
    clear(d);  // K K^T
    for (int block = 0; block < blocks_of(dim_k(a)); ++block) {
      const float* const k = ring.next();
      multiply_tiles<kParts, RowsAre::kColumns>(d, from<false>(k), k, tiles_in(dim_k(a), block),
                                                kTiles);
    }
    // The ring's barriers lie between the last product with F and this.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const LaneIndex lane = lane_of_warp();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * warp + row_of(lane, e), j = column_of(lane, n, e);
        const float value = j < i ? -dl[n][e] : 0.0f;
        sums.dbeta[e / 2] = __fmaf_rn(value, d[n][e], sums.dbeta[e / 2]);
        smem.square[i * kStride + j] = smem.tokens.beta[i] * value;
      }
    }
  }

  /// This thread's share of <S, dS>, of one block.
  __device__ float state_products(const float* state, const Block& d_state) const {
    constexpr int kUnits = kChunk / 4;
    float sum = 0.0f;
    for (int at = static_cast<int>(threadIdx.x); at < kChunk * kUnits; at += kBackwardThreads) {
      const int row = at / kUnits, column = at % kUnits * 4;
      if (row >= d_state.rows || column >= d_state.columns) continue;
      const float4 s = *reinterpret_cast<const float4*>(state + row * kStride + column);
      const float4 d =
          *reinterpret_cast<const float4*>(d_state.first + row * d_state.stride + column);
      sum = __fmaf_rn(s.x, d.x, sum);
      sum = __fmaf_rn(s.y, d.y, sum);
      sum = __fmaf_rn(s.z, d.z, sum);
      sum = __fmaf_rn(s.w, d.w, sum);
    }
    return sum;
  }

  /// 2, 3, and the parts of 5 and 6 that come from rows: a block of dQ and dK.
  template <class R>
  __device__ void keys(R& ring, RowSums& sums, int k_block, bool first) {
    const int columns = tiles_in(dim_k(a), k_block);
    Rows dq, dk, dk_read;
    clear(dq);
    clear(dk);
    clear(dk_read);
    for (int block = 0; block < blocks_of(dim_v(a)); ++block) {
      const int inner = tiles_in(dim_v(a), block);
      const float* const state = ring.next();
      sums.states += state_products(state, state_block(a, a.d_state, index, block, k_block));
      multiply_tiles<kParts, RowsAre::kInner>(dq, from(d_out_block(block)), state, inner, columns);
      const Block dw = value_block(a, a.dw, index, block);
      const auto y = [&](int n, Tile& tile) {
        load_tile(dw, warp, n, tile);
        const LaneIndex lane = lane_of_warp();
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          tile[e] *= -smem.tokens.exp_G[16 * warp + row_of(lane, e)];
        }
      };
      multiply_tiles<kParts, RowsAre::kInner>(dk_read, y, state, inner, columns);
      const float* const d_state = ring.next();
      multiply_tiles<kParts, RowsAre::kInner>(dk, from(value_block(a, a.u, index, block)), d_state,
                                              inner, columns);
    }
    each_element([&](int n, int e, int i, int) {
      dq[n][e] *= a.p.scale * smem.tokens.exp_G[i];
      dk[n][e] *= smem.tokens.rest[i];
    });
    const Block q_rows = key_block(a, a.q, chunk, k_head, k_block);
    const Block k_rows = key_block(a, a.k, chunk, k_head, k_block);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Tile q, k;
      load_tile(q_rows, warp, n, q);
      load_tile(k_rows, warp, n, k);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float written = k[e] * dk[n][e];
        sums.kept += written;
        sums.dG[e / 2] =
            __fmaf_rn(q[e], dq[n][e], sums.dG[e / 2]) + (k[e] * dk_read[n][e] - written);
        dk[n][e] += dk_read[n][e];
      }
    }
    const float* square = ring.next();  // k
    multiply_tiles<kParts, RowsAre::kInner>(dq, from<false>(smem.scores), square, kTiles, columns);
    const auto both = [&](int n, Tile& tile) {  // N + N^T
      Tile other;
      read_tile<false>(smem.square, warp, n, tile);
      read_tile<true>(smem.square, warp, n, other);
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[e] += other[e];
    };
    multiply_tiles<kParts, RowsAre::kInner>(dk, both, square, kTiles, columns);
    square = ring.next();  // q
    multiply_tiles<kParts, RowsAre::kInner>(dk, from<true>(smem.scores), square, kTiles, columns);
    add_rows(dq, 0, k_block, first);
    add_rows(dk, 1, k_block, first);
  }

  /// 5, 6 and 8: dg, dbeta and the gate's parameters. Begins with a barrier.
  __device__ void tokens(RowSums& sums, int64_t slot) {
    const LaneIndex lane = lane_of_warp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float dG = warp_sum<4>(sums.dG[h]), dbeta = warp_sum<4>(sums.dbeta[h]);
      if (lane.t != 0) continue;
      smem.dG[16 * warp + lane.g + 8 * h] = dG;
      smem.dbeta[16 * warp + lane.g + 8 * h] = dbeta;
    }
    const float kept = block_sum<kBackwardThreads>(sums.kept, smem.sums);
    const float states = block_sum<kBackwardThreads>(sums.states, smem.sums);
    if (warp != 0) return;
    const TokenScalars& t = smem.tokens;
    const int last = chunk.num_tokens - 1, first = 2 * (4 * lane.g + lane.t);
    float dG[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first + i;
      dG[i] = smem.dG[token];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) dG[i] -= smem.columns[0][w][token];
      if (token == last) dG[i] += __fmaf_rn(t.exp_G[last], states, kept);
      if (token > last) dG[i] = 0.0f;
    }
    // From the chunk's end.
    float after = dG[0] + dG[1];
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const float later = __shfl_down_sync(kAllLanes, after, static_cast<unsigned>(distance));
      if (first / 2 + distance < kWarpSize) after += later;
    }
    const float beyond = __shfl_down_sync(kAllLanes, after, 1u);
    dG[1] += first / 2 + 1 < kWarpSize ? beyond : 0.0f;
    dG[0] += dG[1];
    float dA_log = 0.0f, ddt_bias = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first + i;
      if (token > last) continue;
      const int64_t place = chunk.begin + token;
      float d_gate = dG[i];
      if (a.gate.A_log != nullptr) {
        const float x = softplus_input(a.gate, chunk.batch_idx, head, place);
        const float rate = -expf(a.gate.A_log[head]);
        d_gate = dG[i] * rate * (x > kSoftplusThreshold ? 1.0f : sigmoid(x));
        dA_log += dG[i] * rate * softplus(x);
        ddt_bias += d_gate;
      }
      float dbeta = smem.dbeta[token];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) dbeta += smem.columns[1][w][token];
      if (a.gate.beta_sigmoid) {
        const float y = t.beta[token] / a.gate.beta_scale;
        dbeta *= a.gate.beta_scale * y * (1.0f - y);
      }
      const int64_t at =
          (chunk.batch_idx * a.p.sizes.num_tokens + place) * a.p.sizes.v_heads + head;
      store_element(a.p.dg, at, d_gate);
      store_element(a.p.dbeta, at, dbeta);
    }
    dA_log = warp_sum(dA_log);
    ddt_bias = warp_sum(ddt_bias);
    if (threadIdx.x == 0) {
      a.gates[slot * a.p.sizes.v_heads + head] = dA_log;
      a.gates[(a.num_slots + slot) * a.p.sizes.v_heads + head] = ddt_bias;
    }
  }

 private:
  /// To the sums of the key head: a lane finds its own values there.
  __device__ void add_rows(const Rows& rows, int which, int k_block, bool first) const {
    const int64_t slot = index / a.p.sizes.v_heads;
    float* const sums =
        a.dqk + ((slot * a.p.sizes.k_heads + k_head) * 2 + which) * kChunk * int64_t{dim_k(a)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const LaneIndex lane = lane_of_warp();
      if (column_of(lane, n, 0) >= left_in(dim_k(a), k_block)) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 16 * warp + lane.g + 8 * h;
        float* const row = sums + i * dim_k(a) + k_block * kChunk;
        auto* const at = reinterpret_cast<float2*>(row + column_of(lane, n, 0));
        float2 pair = make_float2(rows[n][2 * h], rows[n][2 * h + 1]);
        if (!first) {
          const float2 before = *at;
          pair = make_float2(before.x + pair.x, before.y + pair.y);
        }
        *at = pair;
      }
    }
  }
};

}  // namespace kvcore::gdn::backward
