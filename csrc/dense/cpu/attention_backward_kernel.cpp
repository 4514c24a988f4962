// Exact attention, backward: single-threaded, compiled per ISA level. The equations are in
// csrc/dense/README.md.
#include "dense/cpu/operands.h"

namespace kvcore::dense::KVCORE_ISA {
namespace {

/// Where the parts of a task lie.
template <class L>
struct Parts {
  const BackwardTask& task;
  int dim;

  float* keys(int64_t block) const { return task.keys + block * block_floats(dim); }
  float* values(int64_t block) const { return at(task.values, block); }
  float* dk(int64_t block) const { return at(task.dk, block); }
  float* dv(int64_t block) const { return at(task.dv, block); }
  float* queries(int64_t tile) const { return task.queries + tile * tile_floats(dim); }
  float* d_out(int64_t tile) const { return task.d_out + tile * tile_floats(dim); }
  float* lse(int64_t tile) const { return task.rows + tile * 2 * kQueries; }
  float* subtracted(int64_t tile) const { return lse(tile) + kQueries; }
  float* dq(int64_t tile) const { return task.dq + tile * L::kMaxDim * kQueryStride; }

 private:
  static float* at(float* memory, int64_t block) { return memory + block * kKeys * L::kDimStride; }
};

inline void zero_rows(float* x, int64_t stride, int rows, int columns) {
  for (int i = 0; i < rows; ++i) memset(x + i * stride, 0, columns * sizeof(float));
}

template <class L>
void load_keys(const AttentionBackwardParams& p, const Parts<L>& parts, int64_t block,
               Workspace& w) {
  const int dim = parts.dim;
  const int64_t first = block * kKeys;
  const auto [count, rows] = extent_of(p.sizes.kv_len, first, kKeys);
  float* const keys = parts.keys(block);
  copy_rows(p.k, parts.task.batch, parts.task.kv_head, first, count, rows, dim, L::values(keys),
            L::kDimStride);
  by_channel_of<L>(keys, rows, dim, w.pairs, keys + L::kByChannelOfKeys);
  keys[L::kFlagsOfKeys] = all_finite(L::values(keys), L::kDimStride, rows, dim);
  copy_rows(p.v, parts.task.batch, parts.task.kv_head, first, count, rows, dim,
            L::values(parts.values(block)), L::kDimStride);
  zero_rows(parts.dk(block), L::kDimStride, rows, dim);
  zero_rows(parts.dv(block), L::kDimStride, rows, dim);
}

/// Rows of a tile as second operands, by channel and by row.
template <class L>
void load_tile(const InputView& x, const BackwardTask& task, int64_t first, Extent rows, int dim,
               float* memory, Workspace& w) {
  // Packed operands are made of rows in the workspace; others are the rows.
  float* const by_row = memory + L::kByRowOfQueries;
  float* const given = L::kPack == 2 ? w.rows : by_row;
  copy_rows(x, task.batch, task.q_head, first, rows.count, rows.padded_count, dim, L::values(given),
            L::kDimStride);
  across_channels<L>(given, rows.padded_count, dim, memory);
  pairs_of<L>(given, rows.padded_count, dim, by_row);
  memory[L::kFlagsOfQueries] = all_finite(L::values(given), L::kDimStride, rows.padded_count, dim);
}

template <class L>
void load_queries(const AttentionBackwardParams& p, const Parts<L>& parts, int64_t tile,
                  Workspace& w) {
  const BackwardTask& task = parts.task;
  const int dim = parts.dim;
  const int64_t first = tile * kQueries;
  const Extent rows = extent_of(p.sizes.q_len, first, kQueries);
  load_tile<L>(p.q, task, first, rows, dim, parts.queries(tile), w);
  load_tile<L>(p.d_out, task, first, rows, dim, parts.d_out(tile), w);
  zero_rows(parts.dq(tile), kQueryStride, dim, rows.padded_count);
  float* const lse = parts.lse(tile);
  float* const subtracted = parts.subtracted(tile);
  const int64_t at = (task.batch * p.sizes.q_heads + task.q_head) * p.sizes.q_len + first;
  for (int i = 0; i < rows.padded_count; ++i) {
    lse[i] = subtracted[i] = 0.0f;
    if (i >= rows.count) continue;
    // A query without keys has -inf; all its weights are hidden.
    lse[i] = p.lse[at + i] == -INFINITY ? 0.0f : p.lse[at + i] * kLog2E;
    widen_row(p.out, task.batch, task.q_head, first + i, dim, w.scores);
    widen_row(p.d_out, task.batch, task.q_head, first + i, dim, w.d_weights);
    F32 sum = splat(0.0f);
    for (int c = 0; c < dim; c += kLanes) sum = fma(load(w.scores + c), load(w.d_weights + c), sum);
    subtracted[i] = reduce_add(sum) - (p.d_lse ? p.d_lse[at + i] : 0.0f);
  }
}

/// Weights and gradients of scores of a pair of a block and a tile, as operands.
template <class L>
struct Weights {
  const typename L::Element* weights;        // first
  const typename L::Element* scores_first;   // first
  const typename L::Element* scores_second;  // second
};

/// From scores and gradients of weights, both [keys, queries], to weights and gradients of scores.
/// What a query does not see is 0 whatever the query's other values are, a NaN for instance.
template <class L, bool kPartly>
[[gnu::flatten]] Weights<L> differentiate(const Seen& seen, float scale, const float* lse,
                                          const float* subtracted, Workspace& w) {
  const F32 factor = splat(scale), zero = splat(0.0f);
  const I32 end = splat_i32(seen.num_queries);
  constexpr int kStride = kQueryStride;
  for (int i = 0; i < seen.columns; i += kLanes) {
    const F32 own_lse = load(lse + i), own_subtracted = load(subtracted + i);
    const I32 query = add_i32(iota(), splat_i32(i));
    for (int j = 0; j < seen.keys; j += 2) {
      F32 ds[2];
      unroll<2>([&](int r) {
        const int at = (j + r) * kStride + i;
        F32 weight = exp2_nonpositive(load(w.scores + at) * factor - own_lse);
        ds[r] = weight * (load(w.d_weights + at) - own_subtracted);
        if constexpr (kPartly) {
          const Mask exists = less(query, end),
                     hidden = less(query, splat_i32(seen.first_query(j + r)));
          weight = select(hidden, zero, select(exists, weight, zero));
          ds[r] = select(hidden, zero, select(exists, ds[r], zero));
        }
        if constexpr (L::kPack == 2) {
          L::Operand::narrow(weight, L::values(w.first_weights) + at);
          L::Operand::narrow(ds[r], L::values(w.first_scores) + at);
        } else {
          store(w.scores + at, weight);
          store(w.d_weights + at, ds[r]);
        }
      });
      if constexpr (L::kPack == 2) {
        L::Operand::pack(ds[0], ds[1], L::of(w.second_scores) + j / 2 * kStride + i);
      }
    }
  }
  if constexpr (L::kPack == 2) {
    return {L::of(w.first_weights), L::of(w.first_scores), L::of(w.second_scores)};
  } else {
    return {w.scores, w.d_weights, w.d_weights};
  }
}

/// What a pair of a block and a tile adds to dk and dv, and to dq.
template <class L, bool kAddKeys, bool kAddQueries>
void add_pair(const AttentionBackwardParams& p, const Parts<L>& parts, int64_t block, int64_t tile,
              Workspace& w) {
  using Operand = typename L::Operand;
  const Seen seen = seen_of(p, block, tile);
  if (seen.keys == 0) return;
  const int dim = parts.dim, columns = seen.columns;
  float* const keys = parts.keys(block);
  float* const queries = parts.queries(tile);
  float* const d_out = parts.d_out(tile);
  product<Operand, L::kDimFirst, 1>(L::of(keys), L::of(queries), kQueryStride, w.scores,
                                    kQueryStride, seen.keys, columns, dim);
  product<Operand, L::kDimFirst, 1>(L::of(parts.values(block)), L::of(d_out), kQueryStride,
                                    w.d_weights, kQueryStride, seen.keys, columns, dim);
  auto* const differentiate_pair = seen.partly ? differentiate<L, true> : differentiate<L, false>;
  const Weights<L> made =
      differentiate_pair(seen, p.scale * kLog2E, parts.lse(tile), parts.subtracted(tile), w);
  if constexpr (kAddKeys) {
    const auto add = [&](const auto* first, float* rows, float* sums) {
      const auto* const second = L::of(rows + L::kByRowOfQueries);
      if (seen.partly && rows[L::kFlagsOfQueries] == 0.0f) {
        product_of_shown<L>(first, L::kQueryFirst, second, L::kDimStride, sums, L::kDimStride,
                            seen.keys, dim, columns,
                            [&](int key, int, int query) { return seen.sees(query, key); });
      } else {
        product<Operand, L::kQueryFirst, 1>(first, second, L::kDimStride, sums, L::kDimStride,
                                            seen.keys, dim, columns, Part::kAll, kOntoC);
      }
    };
    add(made.weights, d_out, parts.dv(block));
    add(made.scores_first, queries, parts.dk(block));
  }
  if constexpr (kAddQueries) {
    const auto* const first = L::of(keys + L::kByChannelOfKeys);
    if (seen.partly && keys[L::kFlagsOfKeys] == 0.0f) {
      product_of_shown<L>(first, L::kKeyFirst, made.scores_second, kQueryStride, parts.dq(tile),
                          kQueryStride, dim, columns, seen.keys,
                          [&](int, int query, int key) { return seen.sees(query, key); });
    } else {
      product<Operand, L::kKeyFirst, 1>(first, made.scores_second, kQueryStride, parts.dq(tile),
                                        kQueryStride, dim, columns, seen.keys, Part::kAll, kOntoC);
    }
  }
}

/// Row by row to an output [batch, tokens, heads, dim].
template <class L>
void store_rows(float* rows, int count, int dim, float factor, const OutputView& out,
                int64_t first_row, int64_t heads) {
  const F32 f = splat(factor);
  for (int i = 0; i < count; ++i) {
    float* const row = rows + i * L::kDimStride;
    for (int c = 0; c < dim; c += kLanes) store(row + c, load(row + c) * f);
    store_row<typename L::Operand>(row, dim, out, (first_row + i * heads) * dim);
  }
}

template <class L>
void store_queries(const AttentionBackwardParams& p, const Parts<L>& parts, int64_t tile,
                   Workspace& w) {
  const Sizes& s = p.sizes;
  const int64_t first = tile * kQueries;
  const Extent rows = extent_of(s.q_len, first, kQueries);
  transpose(parts.dq(tile), kQueryStride, parts.dim, rows.padded_count, w.rows, L::kDimStride);
  store_rows<L>(w.rows, rows.count, parts.dim, p.scale, p.dq,
                (parts.task.batch * s.q_len + first) * s.q_heads + parts.task.q_head, s.q_heads);
}

template <class L>
void store_keys(const AttentionBackwardParams& p, const Parts<L>& parts, int64_t block) {
  const Sizes& s = p.sizes;
  const int64_t first = block * kKeys;
  const int count = extent_of(s.kv_len, first, kKeys).count;
  const int64_t row = (parts.task.batch * s.kv_len + first) * s.kv_heads + parts.task.kv_head;
  store_rows<L>(parts.dk(block), count, parts.dim, p.scale, p.dk, row, s.kv_heads);
  store_rows<L>(parts.dv(block), count, parts.dim, 1.0f, p.dv, row, s.kv_heads);
}

template <class L>
void run(const AttentionBackwardParams& p, const Parts<L>& parts, BackwardStep step, int64_t index,
         Workspace& w) {
  switch (step) {
    case BackwardStep::kLoadKeys:
      return load_keys(p, parts, index, w);
    case BackwardStep::kLoadQueries:
      return load_queries(p, parts, index, w);
    case BackwardStep::kBlock:
      for (int64_t tile = 0; tile < tiles_of(p.sizes); ++tile) {
        add_pair<L, true, true>(p, parts, index, tile, w);
      }
      return;
    case BackwardStep::kBlockKeys:
      for (int64_t tile = 0; tile < tiles_of(p.sizes); ++tile) {
        add_pair<L, true, false>(p, parts, index, tile, w);
      }
      return;
    case BackwardStep::kTileQueries:
      for (int64_t block = 0; block < blocks_of(p.sizes); ++block) {
        add_pair<L, false, true>(p, parts, block, index, w);
      }
      return;
    case BackwardStep::kStoreQueries:
      return store_queries(p, parts, index, w);
    case BackwardStep::kStoreKeys:
      return store_keys(p, parts, index);
  }
}

}  // namespace

void attention_backward_kernel(const AttentionBackwardParams& p, const BackwardTask& task,
                               BackwardStep step, int64_t index, Workspace& w) {
  const int64_t head_dim = p.sizes.head_dim;
  with_layout(p.q.dtype, head_dim, [&](auto layout) {
    begin_products();
    run(p, Parts<decltype(layout)>{task, static_cast<int>(head_dim)}, step, index, w);
    end_products();
  });
}

}  // namespace kvcore::dense::KVCORE_ISA
