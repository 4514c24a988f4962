// lexico_attention on CPUs: tables of the queries' products with K's atoms, then every unit through
// its segments, then the merge and the products of the weights of V's atoms with V's atoms.
#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "lexico/cpu/attention_kernels.h"

namespace kvcore::lexico {
namespace {

// Tables and partial results of the units in work at a time. Results do not depend on it: units
// are independent.
constexpr int64_t kWaveBytes = 64 << 20;

/// How the work is cut. Depends on shapes only, so that results depend on no other sequence.
struct Plan {
  int64_t group, num_rows;  // rows of a kv head
  int width;                // rows of a unit
  int64_t tiles;            // units of a kv head
  int64_t num_segments;     // at most
  int64_t num_splits;       // partials of a unit: one for each segment, or one for all
  int64_t chunks;           // of V's atoms
  int64_t num_units, wave;  // units at all and at a time
};

Plan plan(const AttentionParams& p) {
  Plan plan = {};
  plan.group = p.q_heads / p.kv_heads;
  plan.num_rows = plan.group * p.q_len;
  plan.width = plan.num_rows <= 4 ? 4 : plan.num_rows <= 8 ? 8 : kMaxRows;
  plan.tiles = (plan.num_rows + plan.width - 1) / plan.width;
  const int64_t tail = std::min(p.k_tiles, p.v_tiles) * kTileTokens;
  plan.num_segments = p.num_blocks + (tail + kTailSegment - 1) / kTailSegment + 1;
  // With more rows than one unit takes, units are the parallel work.
  plan.num_splits = plan.tiles == 1 ? plan.num_segments : 1;
  plan.num_units = p.batch * p.kv_heads * plan.tiles;
  plan.chunks = (p.v_atoms + kAtomChunk - 1) / kAtomChunk;
  const int64_t unit_bytes =
      4 * plan.width * (p.k_atoms + plan.num_splits * p.v_atoms + plan.chunks * p.head_dim);
  plan.wave = std::clamp<int64_t>(kWaveBytes / unit_bytes, 1, plan.num_units);
  return plan;
}

int64_t buffer_len(const AttentionParams& p, int64_t batch_idx) {
  return p.buffer_lens ? p.buffer_lens[batch_idx] : p.buffer_len;
}

Unit make_unit(const AttentionParams& p, const Plan& plan, int64_t unit_idx) {
  Unit unit = {};
  unit.batch_idx = unit_idx / plan.tiles / p.kv_heads;
  unit.kv_head = unit_idx / plan.tiles % p.kv_heads;
  unit.group = plan.group;
  unit.first_row = unit_idx % plan.tiles * plan.width;
  unit.num_rows = static_cast<int>(std::min<int64_t>(plan.width, plan.num_rows - unit.first_row));
  const int64_t kv_len =
      p.num_blocks * kBlockTokens + p.tail_lens[unit.batch_idx] + buffer_len(p, unit.batch_idx);
  const int64_t padding = p.left_padding ? p.left_padding[unit.batch_idx] : 0;
  for (int r = 0; r < unit.num_rows; ++r) {
    const int64_t own = (unit.first_row + r) / plan.group + kv_len - p.q_len;
    unit.end[r] = p.causal ? std::min(kv_len, own + 1) : kv_len;
    unit.begin[r] = std::max(padding, p.window > 0 ? own + 1 - p.window : 0);
  }
  return unit;
}

/// The num-th segment of a sequence; without tokens if the sequence ends before.
Segment make_segment(const AttentionParams& p, const Plan& plan, int64_t batch_idx, int64_t num) {
  const int64_t tail_len = p.tail_lens[batch_idx];
  const int64_t tail_begin = p.num_blocks * kBlockTokens;
  if (num < p.num_blocks) {
    return {SegmentKind::kBlock, num * kBlockTokens, kBlockTokens, num};
  }
  if (num < plan.num_segments - 1) {
    const int64_t first = std::min((num - p.num_blocks) * kTailSegment, tail_len);
    return {SegmentKind::kTail, tail_begin + first, std::min(kTailSegment, tail_len - first),
            first};
  }
  return {SegmentKind::kBuffer, tail_begin + tail_len, buffer_len(p, batch_idx), 0};
}

[[noreturn]] void fail(const AttentionParams& p, const Segment& segment, SegmentError error) {
  const bool keys = error == SegmentError::kKeys;
  const char* const kv = keys ? "k" : "v";
  std::string name = std::string(kv) + "_tail";
  if (segment.kind == SegmentKind::kBlock) {
    name = std::string(kv) + "_blocks[" + std::to_string(segment.idx) + "]";
  }
  throw std::runtime_error("lexico_attention: " + name + " must be codes over " +
                           std::to_string(keys ? p.k_atoms : p.v_atoms) + " atoms, got others");
}

}  // namespace

namespace backend {

void attention(const AttentionParams& p) {
  const Plan work = plan(p);
  const int64_t blocks = (work.wave * work.width + kQueryLanes - 1) / kQueryLanes;
  const int64_t query_floats = blocks * kQueryLanes * p.head_dim;
  const int64_t num_partials = work.wave * work.num_splits;
  const int64_t units_at_once = kWeightLanes / work.width;
  const int64_t max_tasks =
      std::max(num_partials, work.chunks * ((work.wave + units_at_once - 1) / units_at_once));
  const int64_t workers = max_workers(max_tasks);
  const int64_t score_rows = std::max<int64_t>(kBlockTokens, p.buffer_len);
  // Rows of tables, weights and scores lie within a cache line.
  const auto queries = make_aligned_scratch<float>({query_floats});
  const auto tables = make_aligned_scratch<float>({work.wave, work.width, p.k_atoms});
  const auto atoms = make_aligned_scratch<float>({num_partials, work.width, p.v_atoms});
  const auto buffered = make_scratch<float>({num_partials, work.width, p.head_dim});
  const auto scores = make_aligned_scratch<float>({workers, score_rows, work.width});
  const auto weights = make_aligned_scratch<float>({workers, kAtomSlice, kWeightLanes});
  const auto values = make_aligned_scratch<float>({work.chunks, query_floats});
  const auto units = make_scratch<Unit>({work.wave});
  const auto partials = make_scratch<Partial>({num_partials});
  const auto merged = make_scratch<Merged>({work.wave});

  auto* const load_queries = KVCORE_ISA_SELECT(load_queries_kernel);
  auto* const fill_tables = KVCORE_ISA_SELECT(tables_kernel);
  auto* const attend = KVCORE_ISA_SELECT(segment_kernel);
  auto* const merge = KVCORE_ISA_SELECT(merge_kernel);
  auto* const add_atoms = KVCORE_ISA_SELECT(values_kernel);
  auto* const finish = KVCORE_ISA_SELECT(finish_kernel);

  for (int64_t wave = 0; wave < work.num_units; wave += work.wave) {
    const int64_t count = std::min(work.wave, work.num_units - wave);
    std::fill_n(queries.get(), query_floats, 0.0f);
    bool has_codes = p.num_blocks > 0;
    for (int64_t u = 0; u < count; ++u) {
      units[u] = make_unit(p, work, wave + u);
      has_codes = has_codes || p.tail_lens[units[u].batch_idx] > 0;
      load_queries(p, units[u], work.width, u * work.width, queries.get());
    }
    if (has_codes) {
      parallel_tasks((p.k_atoms + kTableChunk - 1) / kTableChunk, [&](int64_t task, int64_t) {
        fill_tables(p, queries.get(), count, work.width, task * kTableChunk,
                    std::min((task + 1) * kTableChunk, p.k_atoms), tables.get());
      });
    }

    std::atomic<int64_t> failed{-1};  // segment and error of a failure
    parallel_tasks(count * work.num_splits, [&](int64_t task, int64_t worker) {
      const int64_t u = task / work.num_splits, split = task % work.num_splits;
      const Unit& unit = units[u];
      Partial& partial = partials[task];
      std::fill_n(partial.max, kMaxRows, -std::numeric_limits<float>::infinity());
      std::fill_n(partial.sum, kMaxRows, 0.0f);
      std::fill_n(partial.poison, kMaxRows, 0.0f);
      partial.has_atoms = partial.has_values = false;
      partial.atoms = &atoms[task * work.width * p.v_atoms];
      partial.values = &buffered[task * work.width * p.head_dim];
      const AttentionScratch scratch = {.scores = &scores[worker * score_rows * work.width]};
      const int64_t lane = u * work.width;
      const float* const own_queries =
          &queries[lane / kQueryLanes * kQueryLanes * p.head_dim + lane % kQueryLanes];
      const int64_t first = work.num_splits == 1 ? 0 : split;
      const int64_t last = work.num_splits == 1 ? work.num_segments : split + 1;
      for (int64_t num = first; num < last; ++num) {
        const Segment segment = make_segment(p, work, unit.batch_idx, num);
        const SegmentError error =
            attend(p, unit, segment, work.width, &tables[u * work.width * p.k_atoms], own_queries,
                   scratch, partial);
        if (error != SegmentError::kNone) {
          failed = (num * p.batch + unit.batch_idx) * 4 + static_cast<int64_t>(error);
          return;
        }
      }
    });
    if (failed >= 0) {
      const int64_t code = failed;
      fail(p, make_segment(p, work, code / 4 % p.batch, code / 4 / p.batch),
           static_cast<SegmentError>(code % 4));
    }

    parallel_tasks(count, [&](int64_t u, int64_t) {
      merged[u] = merge(work.width, &partials[u * work.num_splits], work.num_splits);
    });
    const int64_t groups = (count + units_at_once - 1) / units_at_once;
    parallel_tasks(has_codes ? work.chunks * groups : 0, [&](int64_t task, int64_t worker) {
      const int64_t chunk = task / groups, u = task % groups * units_at_once;
      add_atoms(p, work.width, &partials[u * work.num_splits], work.num_splits,
                std::min(units_at_once, count - u), chunk * kAtomChunk,
                std::min((chunk + 1) * kAtomChunk, p.v_atoms),
                &weights[worker * kAtomSlice * kWeightLanes],
                &values[chunk * query_floats + u * work.width * p.head_dim]);
    });
    parallel_tasks(count, [&](int64_t u, int64_t) {
      finish(p, units[u], work.width, merged[u], &partials[u * work.num_splits], work.num_splits,
             &values[u * work.width * p.head_dim], has_codes ? work.chunks : 0, query_floats);
    });
  }
}

}  // namespace backend
}  // namespace kvcore::lexico
