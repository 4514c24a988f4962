// gdn_chunk_scan on CPUs: a task takes one value head of one sequence, or a range of its value
// channels, through the chunks in turn.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn {
namespace {

// Value channels of a task: at least 32, so that solving the chunk again in every task (a tenth of
// the work at v_dim 128) stays the smaller part. How channels are split changes no result.
constexpr int64_t kMinColumns = 32;

/// Parts into which the value channels of a head are split, so that every thread has work.
int64_t num_parts(int64_t num_heads, int64_t v_dim) {
  const int64_t wanted = (2 * num_threads() + num_heads - 1) / num_heads;
  if (num_heads >= 2 * num_threads()) return 1;
  return std::clamp<int64_t>(v_dim / kMinColumns, 1, wanted);
}

}  // namespace

namespace backend {

void chunk_scan(const ChunkScanParams& p) {
  const int64_t heads = p.sizes.v_heads, num_heads = p.sequences.num_seqs * heads;
  if (num_heads == 0) return;
  const int64_t parts = num_parts(num_heads, p.sizes.v_dim);
  // Whole groups of 16 channels.
  const int64_t groups = p.sizes.v_dim / kHeadDimMultiple;
  const int64_t num_tasks = num_heads * parts;
  const auto workspaces = make_scratch<ForwardWorkspace>({max_workers(num_tasks)});
  auto* const kernel = KVCORE_ISA_SELECT(chunk_scan_kernel);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const int64_t part = task % parts, head = task / parts;
    kernel(p,
           {.sequence = sequence_of(p.sequences, p.sizes, head / heads),
            .head = head % heads,
            .v_begin = static_cast<int>(groups * part / parts * kHeadDimMultiple),
            .v_end = static_cast<int>(groups * (part + 1) / parts * kHeadDimMultiple),
            .first_part = part == 0},
           workspaces[worker]);
  });
}

}  // namespace backend
}  // namespace kvcore::gdn
