#include "core/cpu/parallel.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::backend {

void rewind(const RewindParams& p) {
  constexpr int64_t kLanesPerThread = 8;
  const Store& s = p.store;
  auto* kernel = KVCORE_ISA_SELECT(rewind_kernel);
  const int64_t lanes = 2 * s.kv_heads;
  parallel_for(0, s.batch * lanes, kLanesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      const int64_t b = lane / lanes, page_idx = p.new_lens[b] / kPageTokens;
      // The open page, which is in the tail alone, needs nothing.
      if (p.new_lens[b] % kPageTokens == 0 || page_idx >= s.seq_lens[b] / kPageTokens) continue;
      kernel(p, b, static_cast<int>(lane / s.kv_heads % 2), lane % s.kv_heads, page_idx);
    }
  });
  for (int64_t b = 0; b < s.batch; ++b) s.seq_lens[b] = p.new_lens[b];
}

}  // namespace kvcore::turbo::backend
