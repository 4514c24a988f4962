#include "core/cpu/rows.h"
#include "core/cpu/vec.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::KVCORE_ISA {
namespace {

using namespace ::kvcore::KVCORE_ISA;

}  // namespace

void calibrate_kernel(const CalibrateParams& p, int64_t batch_idx, int64_t head_idx,
                      int64_t token_begin, int64_t token_end, double* sums, ChannelRange range) {
  alignas(64) float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  for (int c = 0; c < head_dim; ++c) sums[c] = 0;
  for (int64_t t = token_begin; t < token_end; ++t) {
    widen_row(p.k, batch_idx, head_idx, t, head_dim, row);
    for (int c = 0; c < head_dim; ++c) sums[c] += static_cast<double>(row[c]);
    for (int c = 0; c < head_dim; c += kLanes) {
      const F32 x = load(row + c), low = load(range.low + c), high = load(range.high + c);
      const Mask finite = less(abs(x), splat(__builtin_inff()));
      store(range.low + c, select(less(select(finite, x, low), low), x, low));
      store(range.high + c, select(less(high, select(finite, x, high)), x, high));
    }
  }
}

void calibrate_amax_kernel(const CalibrateParams& p, int64_t batch_idx, int64_t head_idx,
                           int64_t token_begin, int64_t token_end, const float* mean, float* amax) {
  alignas(64) float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  for (int c = 0; c < head_dim; ++c) amax[c] = 0;
  for (int64_t t = token_begin; t < token_end; ++t) {
    widen_row(p.k, batch_idx, head_idx, t, head_dim, row);
    for (int c = 0; c < head_dim; c += kLanes) {
      const F32 difference = abs(load(row + c) - load(mean + c));
      const Mask finite = less(difference, splat(__builtin_inff()));
      store(amax + c, max(select(finite, difference, splat(0)), load(amax + c)));
    }
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
