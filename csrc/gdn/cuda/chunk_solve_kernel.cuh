// The first kernel of gdn_chunk_scan: everything of a chunk that does not need the state.
//
// grid: one CTA for each (chunk slot, key head), heads fastest. K K^T and Q K^T are computed once
// for all value heads of the key head and stay in registers, warp w having tokens [16 w, + 16) as
// rows and the 16 (w + 1) columns up to the diagonal. Then for each value head: G, L, X, A and P.
#pragma once

#include "gdn/cuda/chunk_scan_args.cuh"
#include "gdn/cuda/heuristics.h"
#include "gdn/cuda/triangle.cuh"

namespace kvcore::gdn {

struct SolveSmem {
  union {
    alignas(1024) uint8_t panels[2][2][kPanelBytes];  // [stage][q, k]
    struct {
      alignas(16) float l[kSquareFloats];
      alignas(16) float x[kSquareFloats];
    };
  };
  float factor[2][kChunk];  // of q: scale and norm; of k: norm
  float G[kChunk];
  float beta[kChunk];
};
static_assert(sizeof(SolveSmem) <= kPortableSmemBytes);
static_assert(kSolveThreads == kTriangleThreads);

/// Sum of squares of a row of a panel.
template <class T>
__device__ __forceinline__ float squares_of_row(const uint8_t* panel, int row) {
  constexpr int kElements = kUnitBytes / sizeof(T);
  struct alignas(kUnitBytes) Unit {
    T x[kElements];
  };
  float sum = 0.0f;
#pragma unroll
  for (int unit = 0; unit < kRowUnits; ++unit) {
    const Unit u = *reinterpret_cast<const Unit*>(panel + panel_offset(row, unit * kUnitBytes));
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float x = to_float(u.x[i]);
      sum = __fmaf_rn(x, x, sum);
    }
  }
  return sum;
}

/// The chunk's tokens as a CTA sees them.
template <class Operand>
struct SolveTask {
  const ScanArgs& args;
  SolveSmem& smem;
  Chunk chunk;
  int64_t k_head;
  int warp;

  __device__ int num_pairs() const { return warp + 1; }

  /// Lower triangles of K K^T and Q K^T, and the factors of q and k.
  __device__ void products(Tile (&kk)[kTokenTiles], Tile (&qk)[kTokenTiles]) {
    using T = typename Operand::Element;
    const int k_dim = static_cast<int>(args.p.sizes.k_dim);
    const auto rows_of = [&](const InputView& x) {
      return token_rows<T>(x, chunk.batch_idx, k_head, chunk.begin, chunk.num_tokens, k_dim);
    };
    const Block<T> q = rows_of(args.q), k = rows_of(args.k);
    const auto copy = [&](int channel, int stage) {
      if (channel < k_dim) {
        copy_panel<kSolveThreads>(static_cast<int>(threadIdx.x), smem.panels[stage][0], q, channel);
        copy_panel<kSolveThreads>(static_cast<int>(threadIdx.x), smem.panels[stage][1], k, channel);
      }
      cp_async_commit();
    };
    const int which = static_cast<int>(threadIdx.x) / kChunk;
    const int token = static_cast<int>(threadIdx.x) % kChunk;
    float squares = 0.0f;
    copy(0, 0);
    for (int first = 0, stage = 0; first < k_dim; first += Operand::kPanelChannels, stage ^= 1) {
      copy(first + Operand::kPanelChannels, stage ^ 1);
      cp_async_wait<1>();
      __syncthreads();
      const auto& panels = smem.panels[stage];
      squares += squares_of_row<T>(panels[which], token);
#pragma unroll
      for (int step = 0; step < kPanelSteps; ++step) {
        if (first + step * Operand::kStepTiles * 8 >= k_dim) break;
        const typename Operand::A q_rows =
            Operand::load(recomputed_lane(), panels[0], 16 * warp, step);
        const typename Operand::A k_rows =
            Operand::load(recomputed_lane(), panels[1], 16 * warp, step);
#pragma unroll
        for (int pair = 0; pair < kTokenTiles / 2; ++pair) {
          if (pair >= num_pairs()) break;
          Operand::template multiply<Order::kNatural>(recomputed_lane(), qk, q_rows, panels[1],
                                                      step, pair);
          Operand::template multiply<Order::kNatural>(recomputed_lane(), kk, k_rows, panels[1],
                                                      step, pair);
        }
      }
      __syncthreads();
    }
    float factor = which == 0 ? args.p.scale : 1.0f;
    if (args.p.qk_l2norm) {
      const float rstd = 1.0f / sqrtf(squares + kNormEpsilon);
      factor *= rstd;
      if (args.p.save_residuals && token < chunk.num_tokens) {
        const Sizes& s = args.p.sizes;
        const int64_t row =
            (which * s.batch + chunk.batch_idx) * s.num_tokens + chunk.begin + token;
        args.p.rstd[row * s.k_heads + k_head] = rstd;
      }
    }
    smem.factor[which][token] = token < chunk.num_tokens ? factor : 0.0f;
  }

  __device__ int64_t gate_index(int token, int64_t head) const {
    const Sizes& s = args.p.sizes;
    return (chunk.batch_idx * s.num_tokens + chunk.begin + token) * s.v_heads + head;
  }

  /// G and beta: two tokens to a lane of the first two warps.
  __device__ void gates(int64_t head) {
    const int lane = recomputed_lane();
    float value[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * lane + i;
      if (warp > 1 || token >= chunk.num_tokens) continue;
      value[i] = warp == 0 ? log_decay(args.gate, chunk.batch_idx, head, chunk.begin + token)
                           : write_strength(args.gate, chunk.batch_idx, head, chunk.begin + token);
    }
    if (warp == 0) {
      // Decays of 1 leave G as it was: in fp32 the sums of two lanes would differ by a rounding,
      // which is much where G is large.
      double sum = double{value[0]} + double{value[1]};
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const double before = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(distance));
        if (lane >= distance) sum += before;
      }
      double before = __shfl_up_sync(kAllLanes, sum, 1u);
      if (lane == 0) before = 0.0;
      before += double{value[0]};
      value[0] = static_cast<float>(before);
      value[1] = static_cast<float>(before + double{value[1]});
    }
    if (warp > 1) return;
    float* const target = warp == 0 ? smem.G : smem.beta;
    target[2 * lane] = value[0];
    target[2 * lane + 1] = value[1];
  }

  /// What the second kernel needs of single tokens, and G.
  __device__ void store_tokens(int64_t head, ChunkRecord& record) const {
    const int token = static_cast<int>(threadIdx.x);
    if (token >= kChunk) return;
    const float G = smem.G[token], last = smem.G[kChunk - 1], exp_G = expf(G);
    record.read[token] = -exp_G * smem.factor[1][token];
    record.out[token] = exp_G * smem.factor[0][token];
    record.write[token] = expf(last - G) * smem.factor[1][token];
    if (token == 0) record.decay = expf(last);
    if (args.p.save_residuals && token < chunk.num_tokens) {
      args.p.g_cumsum[gate_index(token, head)] = G;
    }
  }

  /// L_ij = beta_i k_i k_j, j < i.
  __device__ void store_system(const Tile (&kk)[kTokenTiles]) {
    const LaneIndex lane(recomputed_lane());
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      if (tile >= 2 * num_pairs()) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 16 * warp + lane.g + 8 * h, j = kTileTokens * tile + 2 * lane.t;
        const float own = smem.beta[i] * smem.factor[1][i];
        const auto entry = [&](int e) {
          return j + e < i ? kk[tile][2 * h + e] * own * smem.factor[1][j + e] : 0.0f;
        };
        *reinterpret_cast<float2*>(smem.l + i * kSquareStride + j) =
            make_float2(entry(0), entry(1));
      }
    }
  }

  /// A = (X * D) diag(beta), P = (Q K^T) * D with the factors of q and k.
  __device__ void store_triangles(const Tile (&qk)[kTokenTiles], ChunkRecord& record) const {
    const LaneIndex lane(recomputed_lane());
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      if (tile >= 2 * num_pairs()) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 16 * warp + lane.g + 8 * h, j = kTileTokens * tile + 2 * lane.t;
        const float2 x = load_pair(smem.x + i * kSquareStride + j);
        const float inverse[2] = {x.x, x.y};
        float a[2], p[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool past = j + e <= i;
          const float decay = past_decay(past, smem.G[i], smem.G[j + e]);
          const float score = qk[tile][2 * h + e] * smem.factor[0][i] * smem.factor[1][j + e];
          a[e] = past ? Operand::rounded(inverse[e] * decay * smem.beta[j + e]) : 0.0f;
          p[e] = past ? Operand::rounded(score * decay) : 0.0f;
        }
        const int at = triangle_row(i, tile) * (kRowBytes / 4) + j % (kRowBytes / 4);
        *reinterpret_cast<float2*>(record.a + at) = make_float2(a[0], a[1]);
        *reinterpret_cast<float2*>(record.p + at) = make_float2(p[0], p[1]);
      }
    }
  }

  /// Rows of X, for the backward.
  __device__ void save_inverse(int64_t head) const {
    for (int at = static_cast<int>(threadIdx.x); at < chunk.num_tokens * (kChunk / 4);
         at += kSolveThreads) {
      const int i = at / (kChunk / 4), j = at % (kChunk / 4) * 4;
      const float4 x = *reinterpret_cast<const float4*>(smem.x + i * kSquareStride + j);
      *reinterpret_cast<float4*>(args.p.x_inverse + gate_index(i, head) * kChunk + j) =
          make_float4(j <= i ? x.x : 0.0f, j + 1 <= i ? x.y : 0.0f, j + 2 <= i ? x.z : 0.0f,
                      j + 3 <= i ? x.w : 0.0f);
    }
  }
};

template <class Operand>
__global__ void __launch_bounds__(kSolveThreads, kSolveCtas)
    chunk_solve_kernel(const __grid_constant__ ScanArgs args) {
  if (!args.table.valid()) return;
  const Sizes& s = args.p.sizes;
  const int64_t k_head = blockIdx.x % s.k_heads, slot = blockIdx.x / s.k_heads;
  const Chunk chunk = chunk_of_slot(args.table, slot);
  if (chunk.num_tokens <= 0) return;
  SolveTask<Operand> task{args, *reinterpret_cast<SolveSmem*>(dynamic_smem()), chunk, k_head,
                          static_cast<int>(threadIdx.x) / kWarpSize};
  Tile kk[kTokenTiles] = {}, qk[kTokenTiles] = {};
  task.products(kk, qk);
  const int64_t group = s.v_heads / s.k_heads;
  for (int64_t head = k_head * group; head < (k_head + 1) * group; ++head) {
    ChunkRecord& record = args.records[slot * s.v_heads + head];
    task.gates(head);
    __syncthreads();
    task.store_tokens(head, record);
    task.store_system(kk);
    invert_triangle(task.smem.l, task.smem.x);
    task.store_triangles(qk, record);
    if (args.p.save_residuals) task.save_inverse(head);
    __syncthreads();
  }
}

}  // namespace kvcore::gdn
