// Threads for the CPU backends, on torch's own pool so that torch.set_num_threads holds. Free of
// torch headers; binding/parallel.cpp implements the two functions of namespace detail.
//
// Bodies may throw: the first exception is kept and rethrown on the calling thread once all
// chunks have ended. (torch's own stable call loses the message.) Bodies must write disjoint
// outputs; then results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvcore {

namespace detail {
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);
}  // namespace detail

// Threads of a parallel region that starts here, at least 1.
int64_t num_threads();

// Calls f(chunk_begin, chunk_end) on chunks that cover [begin, end), each of at least grain
// iterations but the last: equal shares, one per thread. For work of equal cost per iteration.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  detail::parallel_for(
      begin, end, grain,
      [](int64_t chunk_begin, int64_t chunk_end, void* context) {
        (*static_cast<const F*>(context))(chunk_begin, chunk_end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Calls f(task, worker) once for each task in [0, num_tasks), worker < max_workers(num_tasks) being
// a slot for scratch memory that no two threads share. Idle threads take the next task, in order,
// so list the expensive ones first. For tasks of unequal cost, such as causal query tiles.
inline int64_t max_workers(int64_t num_tasks) {
  const int64_t threads = num_threads();
  return num_tasks < threads ? num_tasks : threads;
}

template <class F>
void parallel_tasks(int64_t num_tasks, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(0, max_workers(num_tasks), 1, [&](int64_t begin, int64_t end) {
    // A pool smaller than expected runs several workers in one chunk: the first takes every task.
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        f(task, worker);
      }
    }
  });
}

}  // namespace kvcore
