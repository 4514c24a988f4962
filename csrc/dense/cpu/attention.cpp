// dense_attention on CPUs: keys and values of some heads are prepared once; then each task takes
// one tile of queries through the blocks that it sees.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "dense/cpu/attention.h"

namespace kvcore::dense::backend {
namespace {

// Prepared keys and values that exist at a time, one key head's at least.
constexpr int64_t kPreparedFloats = 16 << 20;

}  // namespace

void attention(const AttentionParams& p) {
  const Sizes& s = p.sizes;
  const int64_t blocks = blocks_of(s), tiles = tiles_of(s), group = s.q_heads / s.kv_heads;
  const int64_t floats = block_floats(s.head_dim), heads = s.batch * s.kv_heads;
  const int64_t at_once =
      std::clamp<int64_t>(kPreparedFloats / std::max<int64_t>(blocks * floats, 1), 1, heads);
  const auto prepared = make_aligned_scratch<float>({at_once, blocks, floats});
  const int64_t most_tasks = at_once * std::max(blocks, group * tiles);
  const auto workspaces = make_aligned_scratch<Workspace>({max_workers(most_tasks)});
  auto* const load = KVCORE_ISA_SELECT(load_keys_kernel);
  auto* const attend = KVCORE_ISA_SELECT(attention_kernel);
  for (int64_t begin = 0; begin < heads; begin += at_once) {
    const int64_t count = std::min(at_once, heads - begin);
    parallel_tasks(count * blocks, [&](int64_t task, int64_t worker) {
      const int64_t head = begin + task / blocks;
      load(p,
           {.batch = head / s.kv_heads,
            .kv_head = head % s.kv_heads,
            .block = task % blocks,
            .prepared = &prepared[task * floats]},
           workspaces[worker]);
    });
    parallel_tasks(count * group * tiles, [&](int64_t task, int64_t worker) {
      const int64_t own = task / tiles / group, head = begin + own;
      attend(p,
             {.batch = head / s.kv_heads,
              .q_head = head % s.kv_heads * group + task / tiles % group,
              // With a causal mask the last tiles see the most keys: they come first.
              .tile = tiles - 1 - task % tiles,
              .prepared = &prepared[own * blocks * floats]},
             workspaces[worker]);
    });
  }
}

}  // namespace kvcore::dense::backend
