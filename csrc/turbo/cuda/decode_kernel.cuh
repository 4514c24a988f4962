// turbo_decode: one part of the context for up to 16 query rows of a kv head.
//
// grid: one CTA for each (tile of rows, split of the context, kv head, sequence), tiles fastest, so
// that the CTAs which read the same pages run together. Warp w of a CTA takes pages w, w + warps,
// .. of the split all by itself: K, softmax, V, with its own running maximum and its own copies in
// flight. Warps meet only at the end, to merge: none waits for another's memory, and unpacking the
// steps and zeros of a page is paid once for all its tokens.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/recompute.cuh"
#include "turbo/cuda/decode_args.cuh"
#include "turbo/cuda/decode_units.cuh"
#include "turbo/cuda/query_rows.cuh"
#include "turbo/cuda/scores.cuh"
#include "turbo/cuda/values.cuh"

namespace kvcore::turbo {

/// Shared memory of a CTA. At the end the sums of the warps take the place of the slots.
template <int kHeadDim, int kRows>
struct DecodeSmem {
  static constexpr int kWarps = decode_warps(kHeadDim);
  // Four floats more than a row, so that neighbouring rows are in different banks.
  static constexpr int kSumStride = kHeadDim + 4;

  union {
    alignas(16) uint8_t slots[kWarps][kDecodeSlots * UnitLayout<kHeadDim>::kSlotBytes];
    alignas(16) float sums[kWarps][kRows * kSumStride];
  };
  alignas(16) QueryTile<kHeadDim, kRows> queries;
  float m[kWarps][kRows], l[kWarps][kRows];
  UnitKind kinds[kWarps][kDecodeSlots];
};

/// The rows of a tile as one warp attends to its pages with them.
template <int kHeadDim, int kRows>
class DecodeWarp {
 public:
  static constexpr int kHalves = kRows / 8;
  using Smem = DecodeSmem<kHeadDim, kRows>;
  using Layout = UnitLayout<kHeadDim>;

  __device__ DecodeWarp(const QueryTile<kHeadDim, kRows>& queries, int num_rows, float threshold)
      : queries_(queries),
        rows_(queries.template lane_rows<kHalves>(lane_index().g, num_rows)),
        // Rows are sorted by token, and so are the ends of what they see.
        common_first_(queries.first_key[num_rows - 1]),
        common_end_(queries.end_key[0]),
        threshold_(threshold),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    outputs_.clear();
  }

  /// Pages page, page + stride, ...: those of the pipeline.
  template <class Pipeline>
  __device__ void attend(Pipeline& pipeline, int64_t page, int stride, int num_pages) {
    int key = static_cast<int>(page * kPageTokens);
    for (; num_pages > 0; --num_pages, key += stride * kPageTokens) {
      add_keys(pipeline);
      softmax(key);
      add_values(pipeline, key);
    }
  }

  /// Leaves m, l and sums of the rows to the other warps.
  __device__ void publish(float* m, float* l, float* sums) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int row = lane().g + 8 * h;
      const float sum = warp_sum<4>(rows_.l[h]);
      if (lane().t == 0) {
        m[row] = rows_.m[h];
        l[row] = sum;
      }
#pragma unroll
      for (int block = 0; block < Layout::kChunks; ++block) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto& o = outputs_.o[block];
          const int c = 2 * h + e;
          *reinterpret_cast<float4*>(sums + row * Smem::kSumStride +
                                     sum_channel(lane(), block, e)) =
              make_float4(o[0][c], o[1][c], o[2][c], o[3][c]);
        }
      }
    }
  }

 private:
  static __device__ float scale_of(const uint8_t* block) {
    return *reinterpret_cast<const float*>(block);
  }
  __device__ LaneIndex lane() const { return {lane_ / 4, lane_ % 4}; }

  /// S of a page; the scale is NaN if the page has no block.
  template <class Pipeline>
  __device__ void add_keys(Pipeline& pipeline) {
    // Of no use but to the compiler: without it the old scores, which the second part of an 8-bit
    // block might add to for all it knows, would occupy registers while values are computed.
    scores_ = {};
    UnitKind kind;
    do {
      const auto unit = pipeline.next();
      kind = unit.kind;
      lane_ = recompute(lane_);
      if (kind != UnitKind::kK8Second) {
        k_scale_ = kind == UnitKind::kMissingK ? quiet_nan() : scale_of(unit.data);
      }
      switch (kind) {
        case UnitKind::kK8First:
          add_k8<0, Layout::kFirstChunks>(unit.data);
          break;
        case UnitKind::kK8Second:
          add_k8<Layout::kFirstChunks, Layout::kChunks>(unit.data);
          break;
        case UnitKind::kK4:
          add_narrow_k<4>(unit.data);
          break;
        case UnitKind::kK2:
          add_narrow_k<2>(unit.data);
          break;
        default:
          break;
      }
    } while (kind == UnitKind::kK8First);
  }

  template <class Pipeline>
  __device__ void add_values(Pipeline& pipeline, int key) {
    UnitKind kind;
    do {
      const auto unit = pipeline.next();
      kind = unit.kind;
      lane_ = recompute(lane_);
      if (kind != UnitKind::kV8Second) {
        v_scale_ = kind == UnitKind::kMissingV ? quiet_nan() : scale_of(unit.data);
        if (v_scale_ != v_scale_) poison(key);
        if (live_) outputs_.scale(page_.decay);
      }
      if (!live_) continue;
      switch (kind) {
        case UnitKind::kV8First:
          add_v8<0, Layout::kFirstChunks>(unit.data);
          break;
        case UnitKind::kV8Second:
          add_v8<Layout::kFirstChunks, Layout::kChunks>(unit.data);
          break;
        case UnitKind::kV4:
          add_narrow_v<4>(unit.data);
          break;
        case UnitKind::kV2:
          add_narrow_v<2>(unit.data);
          break;
        default:
          break;
      }
    } while (kind == UnitKind::kV8First);
  }

  __device__ void poison(int key) {
    rows_.poison(queries_, lane().g, key);
    live_ = false;
  }

  template <int kBegin, int kEnd>
  __device__ void add_k8(const uint8_t* unit) {
    const uint8_t* codes = k_lane_codes<8>(unit + Layout::prefix(8), lane());
#pragma unroll
    for (int chunk = kBegin; chunk < kEnd; ++chunk) {
      uint32_t q8[4];
      load_query_fragment<kHalves>(queries_, 0, chunk, q8);
      add_scores8(chunk == 0, codes + (chunk - kBegin) * 8 * k_row_stride(8), q8, scores_);
    }
  }

  template <int kBits>
  __device__ void add_narrow_k(const uint8_t* unit) {
    const uint8_t* codes = k_lane_codes<kBits>(unit + Layout::prefix(kBits), lane());
    const uint8_t* steps = unit + kHeaderBytes;
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      uint32_t q8[4];
      load_query_fragment<kHalves>(queries_, 0, chunk, q8);
      add_narrow_scores<kBits>(chunk == 0, codes + chunk * 4 * k_row_stride(kBits),
                               steps + chunk * kChunk, steps + kHeadDim + chunk * kChunk, lane(),
                               q8, scores_);
    }
  }

  /// Ends K. live_: some row has a P above zero, and nothing is not finite.
  __device__ void softmax(int key) {
    if (k_scale_ != k_scale_) return poison(key);
    const int g = lane().g;
    const auto page_row = [&](int h) -> PageRow {
      const int row = g + 8 * h;
      return {queries_.factor[row] * k_scale_, queries_.first_key[row] - key,
              queries_.end_key[row] - key};
    };
    const bool any = key >= common_first_ && key + kPageTokens <= common_end_
                         ? page_softmax<false>(scores_, page_row, threshold_, lane(), rows_, page_)
                         : page_softmax<true>(scores_, page_row, threshold_, lane(), rows_, page_);
    live_ = __any_sync(kAllLanes, any) != 0;
  }

  template <int kBegin, int kEnd>
  __device__ void add_v8(const uint8_t* unit) {
    add_values8<kBegin, kEnd, Layout::kV8Stride>(
        v_lane_codes<Layout::kV8Stride>(unit + Layout::prefix(8), lane()), v_scale_, page_,
        outputs_);
  }

  template <int kBits>
  __device__ void add_narrow_v(const uint8_t* unit) {
    add_narrow_values<kBits>(v_lane_codes<Layout::kVStride>(unit + Layout::prefix(kBits), lane()),
                             unit + kHeaderBytes, unit + kHeaderBytes + kHeadDim, lane(), v_scale_,
                             page_, outputs_);
  }

  const QueryTile<kHeadDim, kRows>& queries_;
  LaneRows<kHalves> rows_;
  int common_first_, common_end_;  // all rows see the keys in between
  float threshold_;
  int lane_;
  Scores scores_;
  PageWeights<kHalves> page_;
  Outputs<kHeadDim, kHalves> outputs_;
  float k_scale_ = 0.0f, v_scale_ = 0.0f;
  bool live_ = false;
};

/// The warps' results of one row in order, and four channels of their sum.
template <int kHeadDim, int kRows>
struct MergedRow {
  float m, l, o[4];

  __device__ MergedRow(const DecodeSmem<kHeadDim, kRows>& smem, int row, int channel)
      : m(negative_infinity()), l(0.0f), o{} {
    using Smem = DecodeSmem<kHeadDim, kRows>;
#pragma unroll
    for (int warp = 0; warp < Smem::kWarps; ++warp) m = fmaxf(m, smem.m[warp][row]);
    const float base = m == negative_infinity() ? 0.0f : m;
#pragma unroll
    for (int warp = 0; warp < Smem::kWarps; ++warp) {
      const float weight = exp2_approx(smem.m[warp][row] - base);
      l = __fmaf_rn(weight, smem.l[warp][row], l);
      const float4 part =
          *reinterpret_cast<const float4*>(smem.sums[warp] + row * Smem::kSumStride + channel);
      o[0] = __fmaf_rn(weight, part.x, o[0]);
      o[1] = __fmaf_rn(weight, part.y, o[1]);
      o[2] = __fmaf_rn(weight, part.z, o[2]);
      o[3] = __fmaf_rn(weight, part.w, o[3]);
    }
    // A query that is not finite spoils its row as soon as it attends a key.
    if (smem.queries.finite[row] == 0 && smem.queries.end_key[row] > 0) {
      l = quiet_nan();
    }
  }
};

template <int kHeadDim, int kRows>
__global__ void __launch_bounds__(decode_warps(kHeadDim) * kWarpSize, decode_ctas(kHeadDim, kRows))
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Smem = DecodeSmem<kHeadDim, kRows>;
  static_assert(sizeof(Smem) <= kPortableSmemBytes);
  constexpr int kThreads = Smem::kWarps * kWarpSize;
  const DecodeParams& p = args.p;
  const DecodePlan& plan = args.plan;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  const int64_t tile_idx = blockIdx.x % plan.num_tiles;
  const int64_t split = blockIdx.x / plan.num_tiles % plan.num_splits;
  const int64_t unit = blockIdx.x / plan.num_tiles / plan.num_splits;
  const int64_t first_row = tile_idx * kRows;
  const DecodeTile tile =
      decode_tile(args, unit / args.store.kv_heads, unit % args.store.kv_heads, first_row,
                  static_cast<int>(min(int64_t{kRows}, plan.num_rows - first_row)));
  if (!tile.is_valid && threadIdx.x == 0) report_error(args.error_flags, kErrorSeqLens);
  if (split < tile.splits.begin || split >= tile.splits.end) return;
  const int64_t first = max(tile.pages.begin, split * plan.split_pages);
  const int64_t end = min(tile.pages.end, (split + 1) * plan.split_pages);

  const RowSource source = {
      .q = p.q,
      .out = p.out,
      .lse = p.lse,
      .batch_idx = tile.batch_idx,
      .kv_head = tile.kv_head,
      .group = plan.group,
      .q_heads = p.q_heads,
      .q_tokens = p.q_len,
      .first_token = 0,
      .q_len = p.q_len,
      .kv_len = tile.seq_len,
      .first_row = first_row,
      .num_rows = tile.num_rows,
      .k_balance = calibration_row(p.calibration.k_balance, tile.batch_idx, args.store.kv_heads,
                                   tile.kv_head, kHeadDim),
      .k_mean = calibration_row(p.calibration.k_mean, tile.batch_idx, args.store.kv_heads,
                                tile.kv_head, kHeadDim)};

  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const auto lookup = [&](int64_t page, int kv) -> BlockRef {
    const int64_t row = (tile.batch_idx * 2 + kv) * args.store.kv_heads + tile.kv_head;
    if (page == tile.seq_len / kPageTokens) return block_ref(tail_block(args.store, row, page), 8);
    BlockRef ref;
    if (args.refs != nullptr) {
      ref = args.refs[row * args.store.max_pages + page];
    } else {
      const PoolBlock block = pool_block(args.store, row, page);
      ref = block_ref(block.data, block.bits);
    }
    if (ref == 0) report_error(args.error_flags, kErrorBlockTable);
    return ref;
  };
  const int64_t own = max(end - first - warp, int64_t{0});
  const int num_pages = static_cast<int>((own + Smem::kWarps - 1) / Smem::kWarps);
  // Copies start before the queries are read: the two wait for memory together.
  UnitPipeline<kHeadDim, kDecodeSlots, decltype(lookup)> pipeline(
      lookup, smem.slots[warp], smem.kinds[warp], first + warp, Smem::kWarps, num_pages);
  for (int row = warp; row < kRows; row += Smem::kWarps) {
    load_query_row(source, p.softmax, row, smem.queries);
  }
  __syncthreads();

  DecodeWarp<kHeadDim, kRows> rows(smem.queries, tile.num_rows, args.threshold);
  rows.attend(pipeline, first + warp, Smem::kWarps, num_pages);
  cp_async_wait<0>();
  __syncthreads();  // the slots become sums
  rows.publish(smem.m[warp], smem.l[warp], smem.sums[warp]);
  __syncthreads();

  constexpr int kUnits = kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < tile.num_rows * kUnits; i += kThreads) {
    const int row = i / kUnits, channel = i % kUnits * 4;
    MergedRow<kHeadDim, kRows> merged(smem, row, channel);
    const float mean_term = smem.queries.mean_term[row];
    if (plan.num_splits > 1) {
      const int64_t at = partial_index(args, tile, split, row);
      if (channel == 0) args.partials[at] = {merged.m, merged.l, mean_term};
      *reinterpret_cast<float4*>(args.partial_o + at * kHeadDim + channel) =
          make_float4(merged.o[0], merged.o[1], merged.o[2], merged.o[3]);
      continue;
    }
    if (!tile.is_valid) merged.l = quiet_nan();
    const RowResult result = finish_row(merged.m, merged.l, mean_term);
    const int64_t at = source.output_index(row);
    if (channel == 0) p.lse[at] = result.lse;
#pragma unroll
    for (int c = 0; c < 4; ++c) merged.o[c] *= result.factor;
    store_four(p.out, at * kHeadDim + channel, merged.o);
  }
}

}  // namespace kvcore::turbo
