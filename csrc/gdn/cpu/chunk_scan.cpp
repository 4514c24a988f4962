// gdn_chunk_scan on CPUs: a task takes value heads of one key head of one sequence, or a range of
// their value channels, through the chunks in turn.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn {
namespace {

// States of a task: at 128 x 128, 64 KiB and half as much packed each, so that 4 stay in the
// second-level cache. What depends on keys alone is then computed once for so many heads.
constexpr int64_t kMaxTaskHeads = 4;
// Value channels of a task: at least 32, so that solving the chunk again in every task (a tenth of
// the work at v_dim 128) stays the smaller part. How work is split changes no result.
constexpr int64_t kMinColumns = 32;

/// Parts into which the work of a key head is split, so that every thread has work.
struct Parts {
  int64_t heads, columns;
};

Parts split(int64_t num_groups, int64_t group, int64_t v_dim) {
  const int64_t threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + num_groups - 1) / num_groups;
  const int64_t cached = (group + kMaxTaskHeads - 1) / kMaxTaskHeads;
  const int64_t heads = std::min(std::max(wanted, cached), group);
  const int64_t columns = std::min((wanted + heads - 1) / heads, v_dim / kMinColumns);
  return {heads, std::max<int64_t>(columns, 1)};
}

}  // namespace

namespace backend {

void chunk_scan(const ChunkScanParams& p) {
  const Sizes& s = p.sizes;
  const int64_t num_groups = p.sequences.num_seqs * s.k_heads;
  if (num_groups == 0) return;
  const int64_t group = s.v_heads / s.k_heads;
  const Parts parts = split(num_groups, group, s.v_dim);
  const int64_t num_tasks = num_groups * parts.heads * parts.columns;
  const int64_t workers = max_workers(num_tasks);
  const auto workspaces = make_scratch<ForwardWorkspace>({workers});
  const int64_t max_heads = (group + parts.heads - 1) / parts.heads;
  const int64_t state_size = s.k_dim * state_stride(static_cast<int>(s.v_dim));
  const auto states = make_scratch<float>({workers, max_heads, state_size});
  // Whole groups of 16 channels.
  const int64_t column_groups = s.v_dim / kHeadDimMultiple;
  auto* const kernel = KVCORE_ISA_SELECT(chunk_scan_kernel);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const int64_t columns = task % parts.columns, heads = task / parts.columns % parts.heads;
    const int64_t index = task / parts.columns / parts.heads;
    const int64_t first_head = index % s.k_heads * group;
    const auto channel = [&](int64_t part) {
      return static_cast<int>(column_groups * part / parts.columns * kHeadDimMultiple);
    };
    kernel(p,
           {.sequence = sequence_of(p.sequences, s, index / s.k_heads),
            .k_head = index % s.k_heads,
            .head_begin = first_head + group * heads / parts.heads,
            .head_end = first_head + group * (heads + 1) / parts.heads,
            .v_begin = channel(columns),
            .v_end = channel(columns + 1),
            .states = &states[worker * max_heads * state_size]},
           workspaces[worker]);
  });
}

}  // namespace backend
}  // namespace kvcore::gdn
