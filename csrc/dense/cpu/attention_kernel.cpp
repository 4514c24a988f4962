// Exact attention, forward: single-threaded, compiled per ISA level.
#include "dense/cpu/operands.h"

namespace kvcore::dense::KVCORE_ISA {
namespace {

/// Running softmax of a tile's queries, scores to base 2.
struct alignas(64) Softmax {
  float max[kQueries];
  float sum[kQueries];
};

/// Scores [keys, queries] that are not seen become -inf. Returns what scores are still to be
/// multiplied by: times a factor that is not positive, -inf would not be the least.
float hide(const Seen& seen, float scale, float* scores) {
  const bool multiply = !(scale > 0.0f);
  const F32 factor = splat(multiply ? scale : 1.0f), hidden = splat(-INFINITY);
  const I32 end = splat_i32(seen.num_queries);
  for (int j = 0; (seen.partly || multiply) && j < seen.keys; ++j) {
    const I32 first = splat_i32(seen.first_query(j));
    for (int i = 0; i < seen.columns; i += kLanes) {
      float* const at = scores + j * kQueryStride + i;
      const I32 query = add_i32(iota(), splat_i32(i));
      const F32 score = select(less(query, end), load(at) * factor, hidden);
      store(at, select(less(query, first), hidden, score));
    }
  }
  return multiply ? 1.0f : scale;
}

/// Two vectors of a second operand whose rows are apart by one inner index.
template <class L>
void store_pair(F32 even, F32 odd, typename L::Element* out, int row, int column) {
  if constexpr (L::kPack == 2) {
    L::Operand::pack(even, odd, out + row / 2 * kQueryStride + column);
  } else {
    store(out + row * kQueryStride + column, even);
    store(out + (row + 1) * kQueryStride + column, odd);
  }
}

/// Weights of a block as a second operand, in `weights`; the factors that what was summed before is
/// multiplied by, in `rescale`. Returns whether one of them is not 1.
template <class L>
[[gnu::flatten]] bool softmax(const float* scores, int keys, int columns, float scale,
                              Softmax& state, typename L::Element* weights, float* rescale) {
  const F32 factor = splat(scale), lowest = splat(-INFINITY);
  bool rescaled = false;
  for (int i = 0; i < columns; i += kLanes) {
    const float* const column = scores + i;
    // Two chains each, as their latency would be waited for.
    F32 max0 = load(state.max + i), max1 = lowest;
    const F32 before = max0;
    for (int j = 0; j < keys; j += 2) {
      max0 = max(load(column + j * kQueryStride) * factor, max0);
      max1 = max(load(column + (j + 1) * kQueryStride) * factor, max1);
    }
    max0 = max(max1, max0);
    // A query that has seen no key yet has -inf, and -inf - -inf would be NaN.
    const F32 subtracted = select(less(lowest, max0), max0, splat(0.0f));
    F32 sum0 = splat(0.0f), sum1 = splat(0.0f);
    for (int j = 0; j < keys; j += 2) {
      const F32 even = exp2_nonpositive(load(column + j * kQueryStride) * factor - subtracted);
      const F32 odd = exp2_nonpositive(load(column + (j + 1) * kQueryStride) * factor - subtracted);
      sum0 = sum0 + even;
      sum1 = sum1 + odd;
      store_pair<L>(even, odd, weights, j, i);
    }
    const F32 kept = exp2_nonpositive(before - subtracted);
    rescaled = rescaled || any(less(before, max0));
    store(rescale + i, kept);
    store(state.max + i, max0);
    store(state.sum + i, fma(load(state.sum + i), kept, sum0 + sum1));
  }
  return rescaled;
}

template <class L>
void attend(const AttentionParams& p, const QueryTask& task, Workspace& w) {
  using Operand = typename L::Operand;
  const int dim = static_cast<int>(p.sizes.head_dim);
  const int64_t first = task.tile * kQueries;
  const auto [count, columns] = extent_of(p.sizes.q_len, first, kQueries);
  copy_rows(p.q, task.batch, task.q_head, first, count, columns, dim, L::values(w.rows),
            L::kDimStride);
  across_channels<L>(w.rows, columns, dim, w.q_by_channel);
  Softmax state;
  for (int i = 0; i < columns; ++i) {
    state.max[i] = -INFINITY;
    state.sum[i] = 0.0f;
  }
  for (int c = 0; c < dim; ++c) {
    for (int i = 0; i < columns; i += kLanes) {
      store(w.out_by_channel + c * kQueryStride + i, splat(0.0f));
    }
  }
  alignas(64) float rescale[kQueries];
  auto* const weights = L::of(w.first_weights);
  for (int64_t block = 0; block < blocks_of(p.sizes); ++block) {
    const Seen seen = seen_of(p, block, task.tile);
    if (seen.keys == 0) break;
    const float* const prepared = task.prepared + block * block_floats(dim);
    const auto* const values = L::of(prepared + L::kByChannelOfKeys);
    product<Operand, L::kDimFirst, 1>(L::of(prepared), L::of(w.q_by_channel), kQueryStride,
                                      w.scores, kQueryStride, seen.keys, columns, dim);
    const float scale = hide(seen, p.scale * kLog2E, w.scores);
    if (softmax<L>(w.scores, seen.keys, columns, scale, state, weights, rescale)) {
      for (int c = 0; c < dim; ++c) {
        float* const row = w.out_by_channel + c * kQueryStride;
        for (int i = 0; i < columns; i += kLanes) store(row + i, load(row + i) * load(rescale + i));
      }
    }
    if (seen.partly && prepared[L::kFlagsOfKeys] == 0.0f) {
      product_of_shown<L>(values, L::kKeyFirst, weights, kQueryStride, w.out_by_channel,
                          kQueryStride, dim, columns, seen.keys,
                          [&](int, int query, int key) { return seen.sees(query, key); });
      continue;
    }
    product<Operand, L::kKeyFirst, 1>(values, weights, kQueryStride, w.out_by_channel, kQueryStride,
                                      dim, columns, seen.keys, Part::kAll, kOntoC);
  }
  for (int i = 0; i < columns; ++i) {
    rescale[i] = state.sum[i] == 0.0f ? 0.0f : 1.0f / state.sum[i];
  }
  for (int c = 0; c < dim; ++c) {
    float* const row = w.out_by_channel + c * kQueryStride;
    for (int i = 0; i < columns; i += kLanes) store(row + i, load(row + i) * load(rescale + i));
  }
  transpose(w.out_by_channel, kQueryStride, dim, columns, w.rows, L::kDimStride);
  for (int i = 0; i < count; ++i) {
    const int64_t token = task.batch * p.sizes.q_len + first + i;
    store_row<Operand>(w.rows + i * L::kDimStride, dim, p.out,
                       (token * p.sizes.q_heads + task.q_head) * dim);
    p.lse[(task.batch * p.sizes.q_heads + task.q_head) * p.sizes.q_len + first + i] =
        state.sum[i] == 0.0f ? -INFINITY : state.max[i] * kLn2 + logf(state.sum[i]);
  }
}

}  // namespace

void load_keys_kernel(const AttentionParams& p, const KeyTask& task, Workspace& w) {
  const int dim = static_cast<int>(p.sizes.head_dim);
  const int64_t first = task.block * kKeys;
  const auto [count, rows] = extent_of(p.sizes.kv_len, first, kKeys);
  with_layout(p.q.dtype, dim, [&](auto layout) {
    using L = decltype(layout);
    copy_rows(p.k, task.batch, task.kv_head, first, count, rows, dim, L::values(task.prepared),
              L::kDimStride);
    copy_rows(p.v, task.batch, task.kv_head, first, count, rows, dim, L::values(w.rows),
              L::kDimStride);
    by_channel_of<L>(w.rows, rows, dim, w.pairs, task.prepared + L::kByChannelOfKeys);
    task.prepared[L::kFlagsOfKeys] = all_finite(L::values(w.rows), L::kDimStride, rows, dim);
  });
}

void attention_kernel(const AttentionParams& p, const QueryTask& task, Workspace& w) {
  with_layout(p.q.dtype, p.sizes.head_dim, [&](auto layout) {
    begin_products();
    attend<decltype(layout)>(p, task, w);
    end_products();
  });
}

}  // namespace kvcore::dense::KVCORE_ISA
