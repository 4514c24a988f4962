#include <algorithm>

#include "core/cpu/parallel.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::backend {

void dequantize(const DequantizeParams& p) {
  constexpr int64_t kPagesPerThread = 8;
  const Store& s = p.store;
  auto* kernel = KVCORE_ISA_SELECT(dequantize_kernel);
  auto* padding_kernel = KVCORE_ISA_SELECT(dequantize_padding_kernel);
  int64_t longest = 0;
  for (int64_t b = 0; b < s.batch; ++b) longest = std::max<int64_t>(longest, s.seq_lens[b]);
  // One task for the padding of a head and one for each page that the longest sequence has.
  const int64_t tasks_per_head = 1 + (longest + kPageTokens - 1) / kPageTokens;
  const int64_t heads = s.batch * 2 * s.kv_heads;
  parallel_for(0, heads * tasks_per_head, kPagesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t lane = task / tasks_per_head, page_idx = task % tasks_per_head - 1;
      const int64_t b = lane / (2 * s.kv_heads), head_idx = lane % s.kv_heads;
      const int kv = static_cast<int>(lane / s.kv_heads % 2);
      if (page_idx < 0) {
        padding_kernel(p, b, kv, head_idx);
      } else if (page_idx * kPageTokens < s.seq_lens[b]) {
        kernel(p, b, kv, head_idx, page_idx);
      }
    }
  });
}

}  // namespace kvcore::turbo::backend
