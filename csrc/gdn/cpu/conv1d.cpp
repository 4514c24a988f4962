// The convolutions on CPUs: ranges of channels are shared out.
#include "gdn/cpu/conv1d.h"

#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"

namespace kvcore::gdn {
namespace {

/// Calls f(outer, first channel, end, workspace) for every range of channels of every outer index.
template <class F>
void for_each_range(int64_t num_outer, int64_t channels, const F& f) {
  const int64_t ranges = (channels + kConvChannels - 1) / kConvChannels;
  const int64_t num_tasks = num_outer * ranges;
  const auto workspaces = make_scratch<ConvWorkspace>({max_workers(num_tasks)});
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const int64_t begin = task % ranges * kConvChannels;
    f(task / ranges, begin, std::min(begin + kConvChannels, channels), workspaces[worker]);
  });
}

}  // namespace

namespace backend {

void conv1d(const Conv1DParams& p) {
  auto* const kernel = KVCORE_ISA_SELECT(conv1d_kernel);
  for_each_range(p.sequences.num_seqs, p.channels,
                 [&](int64_t seq, int64_t begin, int64_t end, ConvWorkspace& w) {
                   kernel(p, seq, begin, end, w);
                 });
}

void conv1d_backward(const Conv1DBackwardParams& p) {
  auto* const kernel = KVCORE_ISA_SELECT(conv1d_backward_kernel);
  for_each_range(1, p.channels, [&](int64_t, int64_t begin, int64_t end, ConvWorkspace& w) {
    kernel(p, begin, end, w);
  });
}

void conv1d_update(const Conv1DUpdateParams& p) {
  auto* const kernel = KVCORE_ISA_SELECT(conv1d_update_kernel);
  for_each_range(p.batch, p.channels,
                 [&](int64_t batch, int64_t begin, int64_t end, ConvWorkspace& w) {
                   kernel(p, batch, begin, end, w);
                 });
}

}  // namespace backend
}  // namespace kvcore::gdn
