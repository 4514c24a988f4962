// gdn_chunk_scan on CPUs: a task takes value heads of one sequence, of one key head or of several,
// or a range of their value channels, through the chunks in turn.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn {
namespace {

// States of a task: at 128 x 128, 64 KiB and half as much packed each, so that 4 stay in the
// second-level cache. What depends on keys alone is then computed once for those of one key head,
// and what several heads read of a token lies in one page, for which processors search long.
constexpr int64_t kMaxTaskHeads = 4;
// Value channels of a task: at least 32, so that solving the chunk again in every task (a tenth of
// the work at v_dim 128) stays the smaller part. How work is split changes no result.
constexpr int64_t kMinColumns = 32;

/// Tasks for the value heads of a sequence, so that every thread has work: parts of all its key
/// heads, or parts of the value heads of each; then parts of the value channels.
struct Parts {
  int64_t key_heads, heads, columns;
};

Parts split(int64_t num_seqs, const Sizes& s) {
  const int64_t threads = num_threads(), group = s.v_heads / s.k_heads;
  const int64_t num_groups = num_seqs * s.k_heads;
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + num_groups - 1) / num_groups;
  if (wanted == 1 && group < kMaxTaskHeads) {
    const int64_t cached = (s.v_heads + kMaxTaskHeads - 1) / kMaxTaskHeads;
    const int64_t shared = threads == 1 ? 1 : (2 * threads + num_seqs - 1) / num_seqs;
    return {std::min(std::max(cached, shared), s.k_heads), 1, 1};
  }
  const int64_t cached = (group + kMaxTaskHeads - 1) / kMaxTaskHeads;
  const int64_t heads = std::min(std::max(wanted, cached), group);
  const int64_t columns = std::min((wanted + heads - 1) / heads, s.v_dim / kMinColumns);
  return {s.k_heads, heads, std::max<int64_t>(columns, 1)};
}

}  // namespace

namespace backend {

void chunk_scan(const ChunkScanParams& p) {
  const Sizes& s = p.sizes;
  const int64_t num_seqs = p.sequences.num_seqs;
  if (num_seqs * s.k_heads == 0) return;
  const int64_t group = s.v_heads / s.k_heads;
  const Parts parts = split(num_seqs, s);
  const int64_t num_tasks = num_seqs * parts.key_heads * parts.heads * parts.columns;
  const int64_t workers = max_workers(num_tasks);
  const auto workspaces = make_scratch<ForwardWorkspace>({workers});
  const int64_t max_key_heads = (s.k_heads + parts.key_heads - 1) / parts.key_heads;
  const int64_t max_heads = (group * max_key_heads + parts.heads - 1) / parts.heads;
  const int64_t state_size = s.k_dim * state_stride(static_cast<int>(s.v_dim));
  const auto states = make_scratch<float>({workers, max_heads, state_size});
  // Whole groups of 16 channels.
  const int64_t column_groups = s.v_dim / kHeadDimMultiple;
  auto* const kernel = KVCORE_ISA_SELECT(chunk_scan_kernel);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const int64_t columns = task % parts.columns, heads = task / parts.columns % parts.heads;
    const int64_t index = task / parts.columns / parts.heads;
    const int64_t part = index % parts.key_heads;
    const int64_t first_head = s.k_heads * part / parts.key_heads * group;
    const int64_t num_heads = s.k_heads * (part + 1) / parts.key_heads * group - first_head;
    const auto channel = [&](int64_t i) {
      return static_cast<int>(column_groups * i / parts.columns * kHeadDimMultiple);
    };
    kernel(p,
           {.sequence = sequence_of(p.sequences, s, index / parts.key_heads),
            .head_begin = first_head + num_heads * heads / parts.heads,
            .head_end = first_head + num_heads * (heads + 1) / parts.heads,
            .v_begin = channel(columns),
            .v_end = channel(columns + 1),
            .states = &states[worker * max_heads * state_size]},
           workspaces[worker]);
  });
}

}  // namespace backend
}  // namespace kvcore::gdn
