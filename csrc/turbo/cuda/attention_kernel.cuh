// The second kernel of turbo_attention: softmax(Q K^T) V over quantized pages.
//
// grid: one CTA for each (tile of query rows, kv head), tiles fastest and the last ones first: with
// a causal mask they see the most keys, and a head's pages stay in L2 while its tiles run. A tile
// is kAttentionWarps * kTiles * 16 rows of a kv head, those of all its query heads; a warp has
// kTiles * 16 of them. Per page: K and V arrive in shared memory (the next page's copies run
// meanwhile), S = Q8 . K8 in int32, the softmax in registers, whose P8 are A fragments as they
// are, and O += weight * (P8 . V8), summed over the page in int32 and over pages in fp32.
#pragma once

#include "core/cuda/recompute.cuh"
#include "turbo/cuda/attention_args.cuh"
#include "turbo/cuda/query_rows.cuh"
#include "turbo/cuda/values.cuh"

namespace kvcore::turbo {

template <int kHeadDim>
struct AttentionSmem {
  static constexpr int kRows = attention_tile_rows(kHeadDim);
  alignas(16) uint8_t pages[kAttentionStages][prefill_page_bytes(kHeadDim)];
  alignas(16) QueryTile<kHeadDim, kRows> queries;
  // What is not needed while products are computed waits here: registers are scarce then.
  float rows[attention_warp_tiles(kHeadDim)][2][2][kAttentionWarps * kWarpSize];  // m, l of a lane
  RowSource source;
  const uint8_t* page_zero;
  int first_page, end_page;
};

/// The rows of one warp.
template <int kHeadDim>
class AttentionWarp {
 public:
  static constexpr int kTiles = attention_warp_tiles(kHeadDim);
  static constexpr int kChunks = kHeadDim / kChunk;
  using Queries = decltype(AttentionSmem<kHeadDim>::queries);

  /// Rows [row, row + num_rows) of the CTA's tile, num_rows > 0.
  __device__ AttentionWarp(AttentionSmem<kHeadDim>& smem, int row, int num_rows)
      : smem_(smem), queries_(smem.queries), row_(row), last_row_(row + num_rows - 1) {
    const LaneIndex lane = lane_index();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      save_rows(tile, queries_.template lane_rows<2>(row + 16 * tile + lane.g, row + num_rows));
      outputs_[tile].clear();
    }
  }

  __device__ void attend(const uint8_t* page, int key, float threshold) {
    // Rows are sorted by token, and so are the ends of what they see.
    if (key >= queries_.end_key[last_row_] || key + kPageTokens <= queries_.first_key[row_]) return;
    // Those of K and V, read where they are used: at head_dim 128 each register more would spill.
    const float* scales = reinterpret_cast<const float*>(page + prefill_scales_offset(kHeadDim));
    const int thread = recompute(static_cast<int>(threadIdx.x)) % kWarpSize;
    const LaneIndex lane = {thread / 4, thread % 4};
    if (scales[0] != scales[0] || scales[1] != scales[1]) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        LaneRows<2> rows = load_rows(tile);
        rows.poison(queries_, row_ + 16 * tile + lane.g, key);
        save_rows(tile, rows);
      }
      return;
    }
    const uint8_t* fragments = page + thread * 16;
    Scores scores[kTiles];
    add_scores(fragments, scores);

    const bool is_common =
        key >= queries_.first_key[last_row_] && key + kPageTokens <= queries_.end_key[row_];
    bool any = false;
    PageWeights<2> weights[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto page_row = [&](int h) -> PageRow {
        const int row = row_ + 16 * tile + lane.g + 8 * h;
        return {queries_.factor[row] * scales[0], queries_.first_key[row] - key,
                queries_.end_key[row] - key};
      };
      LaneRows<2> rows = load_rows(tile);
      any |= is_common
                 ? page_softmax<false>(scores[tile], page_row, threshold, lane, rows, weights[tile])
                 : page_softmax<true>(scores[tile], page_row, threshold, lane, rows, weights[tile]);
      save_rows(tile, rows);
    }
    if (__any_sync(kAllLanes, any) == 0) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      outputs_[tile].scale(weights[tile].decay);
#pragma unroll
      for (int h = 0; h < 2; ++h) weights[tile].weight[h] *= scales[1];
    }
    add_values(fragments + kPageTokens * kHeadDim, weights);
  }

  __device__ void store(const RowSource& source) {
    const int thread = recompute(static_cast<int>(threadIdx.x)) % kWarpSize;
    const LaneIndex lane = {thread / 4, thread % 4};
    const int first_row = recompute(row_);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const LaneRows<2> rows = load_rows(tile);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 16 * tile + lane.g + 8 * h;
        float l = warp_sum<4>(rows.l[h]);
        if (row >= source.num_rows) continue;
        // A query that is not finite spoils its row as soon as it attends a key.
        if (queries_.finite[row] == 0 && queries_.end_key[row] > 0) l = quiet_nan();
        const RowResult result = finish_row(rows.m[h], l, queries_.mean_term[row]);
        const int64_t at = source.output_index(row);
        if (lane.t == 0) source.lse[at] = result.lse;
#pragma unroll
        for (int block = 0; block < kChunks; ++block) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float x[4];
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
              x[i] = outputs_[tile].o[block][i][2 * h + e] * result.factor;
            }
            store_four(source.out, at * kHeadDim + sum_channel(lane, block, e), x);
          }
        }
      }
    }
  }

 private:
  __device__ LaneRows<2> load_rows(int tile) const {
    LaneRows<2> rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows.m[h] = smem_.rows[tile][h][0][threadIdx.x];
      rows.l[h] = smem_.rows[tile][h][1][threadIdx.x];
    }
    return rows;
  }
  __device__ void save_rows(int tile, const LaneRows<2>& rows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      smem_.rows[tile][h][0][threadIdx.x] = rows.m[h];
      smem_.rows[tile][h][1][threadIdx.x] = rows.l[h];
    }
  }

  __device__ __forceinline__ void add_scores(const uint8_t* fragments, Scores (&scores)[kTiles]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) add_chunk(fragments, chunk, scores);
  }

  __device__ __forceinline__ void add_chunk(const uint8_t* fragments, int chunk,
                                            Scores (&scores)[kTiles]) {
    fragments += chunk * kBlockFragmentBytes;
    uint32_t q8[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_query_fragment<2>(queries_, row_ + 16 * tile, chunk, q8[tile]);
    }
#pragma unroll
    for (int j = 0; j < kChunksOfPage; ++j) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const Words k8 = load_words(fragments + (j * 2 + pair) * kFragmentPairBytes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t b[2] = {k8.w[2 * i], k8.w[2 * i + 1]};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma_step(chunk == 0, scores[tile].s[j][2 * pair + i], q8[tile], b, kSumBias);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_values(const uint8_t* fragments,
                                             const PageWeights<2> (&weights)[kTiles]) {
#pragma unroll
    for (int block = 0; block < kChunks; ++block) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        int32_t sum[kTiles][2][4];
#pragma unroll
        for (int j = 0; j < kChunksOfPage; ++j) {
          const Words v8 =
              load_words(fragments + ((block * kChunksOfPage + j) * 2 + pair) * kFragmentPairBytes);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t b[2] = {v8.w[2 * i], v8.w[2 * i + 1]};
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              mma_step(j == 0, sum[tile][i], weights[tile].p8[j], b, kSumBias);
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              float& o = outputs_[tile].o[block][2 * pair + i][c];
              o = __fmaf_rn(weights[tile].weight[c / 2], sum_value(sum[tile][i][c]), o);
            }
          }
        }
      }
    }
  }

  AttentionSmem<kHeadDim>& smem_;
  const Queries& queries_;
  int row_, last_row_;
  Outputs<kHeadDim, 2> outputs_[kTiles];
};

/// NaN for the rows of a tile slot, counted over all tokens at once: which sequence they belong to
/// nobody knows.
template <int kHeadDim>
__device__ inline void store_nan_rows(const AttentionArgs& args, int64_t head, int64_t slot) {
  constexpr int kRows = attention_tile_rows(kHeadDim);
  const AttentionParams& p = args.p;
  for (int64_t row = slot * kRows + threadIdx.x;
       row < min((slot + 1) * kRows, p.q_len * args.group); row += blockDim.x) {
    const int64_t q_head = head * args.group + row % args.group;
    const int64_t at = q_head * p.q_len + row / args.group;
    p.lse[at] = quiet_nan();
    for (int c = 0; c < kHeadDim; ++c) {
      store_element(p.out, at * kHeadDim + c, quiet_nan());
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kAttentionWarps* kWarpSize, kAttentionCtas)
    attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Smem = AttentionSmem<kHeadDim>;
  static_assert(sizeof(Smem) <= kPortableSmemBytes);
  constexpr unsigned kThreads = kAttentionWarps * kWarpSize;
  constexpr int kRows = Smem::kRows, kWarpRows = kRows / kAttentionWarps;
  constexpr int kPageBytes = prefill_page_bytes(kHeadDim);
  const AttentionParams& p = args.p;
  const int64_t slot = args.num_tiles - 1 - blockIdx.x % args.num_tiles;
  const int64_t head = blockIdx.x / args.num_tiles;
  if (args.is_valid != nullptr && *args.is_valid == 0) {
    store_nan_rows<kHeadDim>(args, head, slot);
    return;
  }
  const Sequence s = sequence_of_slot<true>(args, kRows, slot);
  const int64_t first_row = s.unit * kRows;
  if (first_row >= s.q_len * args.group) return;
  const RowSource source = {
      .q = p.q,
      .out = p.out,
      .lse = p.lse,
      .batch_idx = s.batch_idx,
      .kv_head = head,
      .group = args.group,
      .q_heads = p.q_heads,
      .q_tokens = p.q_len,
      .first_token = s.q_begin,
      .q_len = s.q_len,
      .kv_len = s.kv_len,
      .first_row = first_row,
      .num_rows = static_cast<int>(min(int64_t{kRows}, s.q_len * args.group - first_row)),
      .k_balance =
          calibration_row(p.calibration.k_balance, s.batch_idx, p.kv_heads, head, kHeadDim),
      .k_mean = calibration_row(p.calibration.k_mean, s.batch_idx, p.kv_heads, head, kHeadDim)};

  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const PageRange range = visible_pages(p.softmax, s.q_len, s.kv_len, source.token(0),
                                        source.token(source.num_rows - 1));
  // Pages fit an int, as kv_len does.
  const int first_page = static_cast<int>(range.begin), end_page = static_cast<int>(range.end);
  const uint8_t* const page_zero =
      args.pages + (head * args.num_pages + s.first_page_slot - s.first_page) * kPageBytes;
  const auto copy_page = [&smem](const uint8_t* zero, int page, int end) {
    if (page < end) {
      const uint8_t* gmem = zero + int64_t{page} * kPageBytes;
      uint8_t* stage = smem.pages[page % kAttentionStages];
      // One row of the whole page: all addresses are the thread's own plus constants.
      const unsigned own = static_cast<unsigned>(recompute(static_cast<int>(threadIdx.x))) * 16;
#pragma unroll
      for (unsigned i = 0; i < kPageBytes; i += kThreads * 16) {
        if (i + kThreads * 16 <= kPageBytes || i + own < kPageBytes) {
          cp_async_16(stage + own + i, gmem + own + i);
        }
      }
    }
    cp_async_commit();
  };
  copy_page(page_zero, first_page, end_page);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warp_row = warp * kWarpRows;
  for (int row = warp_row; row < warp_row + kWarpRows; ++row) {
    load_query_row(source, p.softmax, row, smem.queries);
  }
  if (threadIdx.x == 0) {
    smem.source = source;
    smem.page_zero = page_zero;
    smem.first_page = first_page;
    smem.end_page = end_page;
  }
  __syncthreads();

  // A warp without rows copies with the others; its first row sees nothing.
  AttentionWarp<kHeadDim> rows(smem, warp_row, max(min(kWarpRows, source.num_rows - warp_row), 1));
  for (int page = smem.first_page; page < smem.end_page; ++page) {
    cp_async_wait<0>();
    __syncthreads();  // the page is there for all; the stage of the one before it is free
    copy_page(smem.page_zero, page + 1, smem.end_page);
    rows.attend(smem.pages[page % kAttentionStages], page * kPageTokens, args.threshold);
  }
  rows.store(smem.source);
}

}  // namespace kvcore::turbo
