#include "core/cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <exception>

namespace kvcore {

int64_t num_threads() {
  const int64_t threads = torch::stable::get_num_threads();
  return threads < 1 ? 1 : threads;
}

namespace detail {

void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  if (begin >= end) return;
  std::exception_ptr first;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(begin, end, grain < 1 ? 1 : grain,
                              [&](int64_t chunk_begin, int64_t chunk_end) {
                                try {
                                  body(chunk_begin, chunk_end, context);
                                } catch (...) {
                                  // One writer only; the end of the region orders the write before
                                  // the read below.
                                  if (!failed.exchange(true)) first = std::current_exception();
                                }
                              });
  if (failed) std::rethrow_exception(first);
}

}  // namespace detail
}  // namespace kvcore
