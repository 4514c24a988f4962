#include <algorithm>
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::backend {
namespace {

// A page takes microseconds, a thread that long to wake.
constexpr int64_t kPagesPerThread = 8;

// Bulk pages of one sequence: tasks [task_begin, task_begin + heads * pages * 2).
struct BulkTasks {
  AppendRange range;
  int64_t task_begin;
  int64_t pages() const { return range.bulk_end() - range.bulk_begin(); }
};

}  // namespace

void append(const AppendParams& p) {
  const Store& s = p.store;
  auto* page_kernel = KVCORE_ISA_SELECT(append_page_kernel);
  auto* tail_kernel = KVCORE_ISA_SELECT(append_tail_kernel);

  // All memory is taken before anything is written.
  std::vector<BulkTasks> sequences;
  sequences.reserve(s.batch);
  int64_t num_tasks = 0, most_new = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t padding = p.left_padding != nullptr ? p.left_padding[b] : 0;
    const int64_t begin = s.seq_lens[b], end = begin + p.num_new - padding;
    if (begin == end) continue;
    sequences.push_back({{b, padding, begin, end}, num_tasks});
    num_tasks += s.kv_heads * sequences.back().pages() * 2;
    most_new = std::max(most_new, end - begin);
  }
  const auto task_amax = make_scratch<float>({num_tasks});

  parallel_for(0, num_tasks, kPagesPerThread, [&](int64_t begin, int64_t end) {
    auto sequence = sequences.begin();
    for (int64_t task = begin; task < end; ++task) {
      // The sequence of a task is the last that begins at or before it.
      while (sequence + 1 != sequences.end() && (sequence + 1)->task_begin <= task) ++sequence;
      const int64_t i = task - sequence->task_begin;
      // K and V in turn, so that equal shares of the tasks are equal work.
      const int64_t page_idx = sequence->range.bulk_begin() + i / 2 % sequence->pages();
      const int64_t head_idx = i / 2 / sequence->pages();
      task_amax[task] =
          page_kernel(p, sequence->range, static_cast<int>(i % 2), head_idx, page_idx);
    }
  });

  const int64_t num_lanes = static_cast<int64_t>(sequences.size()) * s.kv_heads * 2;
  const int64_t tokens = std::clamp<int64_t>(most_new, 1, kPageTokens);
  parallel_for(0, num_lanes, kPagesPerThread * kPageTokens / tokens,
               [&](int64_t begin, int64_t end) {
                 for (int64_t lane = begin; lane < end; ++lane) {
                   const BulkTasks& sequence = sequences[lane / (s.kv_heads * 2)];
                   const int kv = static_cast<int>(lane % 2);
                   const int64_t head_idx = lane / 2 % s.kv_heads;
                   float amax = 0;
                   for (int64_t i = 0; i < sequence.pages(); ++i) {
                     const int64_t task = (head_idx * sequence.pages() + i) * 2 + kv;
                     amax = std::max(amax, task_amax[sequence.task_begin + task]);
                   }
                   tail_kernel(p, sequence.range, kv, head_idx, amax);
                 }
               });
  for (const BulkTasks& sequence : sequences) {
    s.seq_lens[sequence.range.batch_idx] = static_cast<int32_t>(sequence.range.end);
  }
}

}  // namespace kvcore::turbo::backend
