// dense_attention_backward on CPUs: a task takes the query heads of one key head, one after the
// other, so that their gradients are added up in a fixed order without waiting. With few tasks for
// the threads, all threads share each of them; what is computed does not change.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "dense/cpu/attention.h"

namespace kvcore::dense::backend {
namespace {

using Kernel = void(const AttentionBackwardParams&, const BackwardTask&, BackwardStep, int64_t,
                    Workspace&);

// Products of a pair of a block and a tile: in one go, or keys and queries each by themselves.
constexpr int64_t kProducts = 5, kSharedProducts = 7;

/// Whether a task on all threads, one after the other, takes less time than a task on each.
bool share(int64_t num_tasks) {
  const int64_t threads = num_threads();
  const int64_t rounds = (num_tasks + threads - 1) / threads;
  return kSharedProducts * num_tasks < kProducts * rounds * threads;
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  const Sizes& s = p.sizes;
  const int64_t blocks = blocks_of(s), tiles = tiles_of(s), group = s.q_heads / s.kv_heads;
  const int64_t num_tasks = s.batch * s.kv_heads;
  const bool shared = share(num_tasks);
  const int64_t owners = shared ? 1 : max_workers(num_tasks);
  const int64_t workers = shared ? num_threads() : owners;
  const int64_t dim = stride_dim(s.head_dim), block_rows = kKeys * padded(dim);
  // In the order of BackwardTask.
  const int64_t sizes[] = {blocks * block_floats(dim), blocks * block_rows,
                           blocks * block_rows,        blocks * block_rows,
                           tiles * tile_floats(dim),   tiles * tile_floats(dim),
                           tiles * 2 * kQueries,       tiles * dim * padded(kQueries)};
  int64_t size = 0;
  for (const int64_t part : sizes) size += part;
  const auto memory = make_aligned_scratch<float>({owners, size});
  const auto workspaces = make_aligned_scratch<Workspace>({workers});
  auto* const kernel = KVCORE_ISA_SELECT(attention_backward_kernel);

  const auto task_of = [&](int64_t index, int64_t owner) {
    BackwardTask task = {};
    task.batch = index / s.kv_heads;
    task.kv_head = index % s.kv_heads;
    task.q_head = task.kv_head * group;
    float* next = &memory[owner * size];
    float** const parts[] = {&task.keys,    &task.values, &task.dk,   &task.dv,
                             &task.queries, &task.d_out,  &task.rows, &task.dq};
    for (int i = 0; i < 8; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
    return task;
  };
  // Steps of a task; `each` runs one for all its indices.
  const auto run = [&](BackwardTask task, const auto& each) {
    each(task, BackwardStep::kLoadKeys, blocks);
    for (int64_t i = 0; i < group; ++i, ++task.q_head) {
      each(task, BackwardStep::kLoadQueries, tiles);
      if (shared) {
        each(task, BackwardStep::kBlockKeys, blocks);
        each(task, BackwardStep::kTileQueries, tiles);
      } else {
        each(task, BackwardStep::kBlock, blocks);
      }
      each(task, BackwardStep::kStoreQueries, tiles);
    }
    each(task, BackwardStep::kStoreKeys, blocks);
  };
  if (shared) {
    for (int64_t index = 0; index < num_tasks; ++index) {
      run(task_of(index, 0), [&](const BackwardTask& task, BackwardStep step, int64_t count) {
        parallel_tasks(count, [&](int64_t i, int64_t worker) {
          kernel(p, task, step, i, workspaces[worker]);
        });
      });
    }
  } else {
    parallel_tasks(num_tasks, [&](int64_t index, int64_t worker) {
      run(task_of(index, worker), [&](const BackwardTask& task, BackwardStep step, int64_t count) {
        for (int64_t i = 0; i < count; ++i) kernel(p, task, step, i, workspaces[worker]);
      });
    });
  }
}

}  // namespace kvcore::dense::backend
