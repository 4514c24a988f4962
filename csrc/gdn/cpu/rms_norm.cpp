// RMSNorm on CPUs: ranges of rows are shared out.
#include "gdn/cpu/rms_norm.h"

#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"

namespace kvcore::gdn {
namespace {

// Elements that are worth a thread's waking up.
constexpr int64_t kGrainElements = 16384;
// The gradient of the weight is summed by blocks of rows, which depend on the tensor's shape alone.
// A block's sum is a row of memory, so that a block is of 8 rows at least; and 256 of them are few
// enough to add up, and many enough for the threads.
constexpr int64_t kBlockElements = 8192, kBlockRows = 8, kMaxBlocks = 256;

int64_t rows_of(const NormSizes& sizes) { return sizes.batch * sizes.heads * sizes.num_tokens; }

std::unique_ptr<float[]> widen_weight(const InputView& weight, int64_t channels, float offset) {
  auto row = make_scratch<float>({norm_row_floats(channels)});
  KVCORE_ISA_SELECT(rms_norm_weight_kernel)(weight, channels, offset, row.get());
  return row;
}

}  // namespace

namespace backend {

void rms_norm(const RmsNormParams& p) {
  const auto weight = widen_weight(p.weight, p.sizes.channels, p.weight_offset);
  auto* const kernel = KVCORE_ISA_SELECT(rms_norm_kernel);
  parallel_for(0, rows_of(p.sizes), std::max<int64_t>(1, kGrainElements / p.sizes.channels),
               [&](int64_t begin, int64_t end) { kernel(p, weight.get(), begin, end); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  const int64_t rows = rows_of(p.sizes), channels = p.sizes.channels;
  const int64_t block_rows =
      std::max({kBlockRows, kBlockElements / channels, (rows + kMaxBlocks - 1) / kMaxBlocks});
  const int64_t num_blocks = (rows + block_rows - 1) / block_rows;
  const int64_t row_floats = norm_row_floats(channels);
  const auto weight = widen_weight(p.weight, channels, p.weight_offset);
  const auto partial = make_scratch<float>({num_blocks, row_floats});
  const auto scratch = make_scratch<float>({max_workers(num_blocks), row_floats});
  auto* const kernel = KVCORE_ISA_SELECT(rms_norm_backward_kernel);
  parallel_tasks(num_blocks, [&](int64_t block, int64_t worker) {
    const int64_t begin = block * block_rows;
    kernel(p, weight.get(), begin, std::min(begin + block_rows, rows),
           scratch.get() + worker * row_floats, partial.get() + block * row_floats);
  });
  auto* const sum = KVCORE_ISA_SELECT(rms_norm_sum_kernel);
  parallel_for(0, channels, std::max<int64_t>(1, kGrainElements / num_blocks),
               [&](int64_t begin, int64_t end) {
                 sum(partial.get(), num_blocks, row_floats, begin, end, p.dweight);
               });
}

}  // namespace backend
}  // namespace kvcore::gdn
