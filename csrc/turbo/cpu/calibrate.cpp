#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::backend {
namespace {

constexpr float kMinBalance = 0x1p-8f;
// Blocks that one task runs through: enough work for a thread, few partial results.
constexpr int64_t kBlocksPerTask = 16;

// Partial results of one head: sums of each block, ranges of each task.
struct Partials {
  const double* sums;  // [num_blocks, head_dim]
  const float* low;    // [num_tasks, head_dim]
  const float* high;   // [num_tasks, head_dim]
  int64_t num_blocks, num_tasks;
};

void mean_of_head(const CalibrateParams& p, const Partials& partials, int64_t num_tokens,
                  float* mean) {
  for (int64_t c = 0; c < p.head_dim; ++c) {
    double total = 0;
    for (int64_t i = 0; i < partials.num_blocks; ++i) total += partials.sums[i * p.head_dim + c];
    const float value = static_cast<float>(total / static_cast<double>(num_tokens));
    mean[c] = p.subtract_mean && num_tokens > 0 && std::isfinite(value) ? value : 0;
  }
}

// False if a difference overflows, so that the ends of the range do not tell the largest one.
bool amax_of_head(const CalibrateParams& p, const Partials& partials, const float* mean,
                  float* amax) {
  for (int64_t c = 0; c < p.head_dim; ++c) {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int64_t i = 0; i < partials.num_tasks; ++i) {
      low = std::min(low, partials.low[i * p.head_dim + c]);
      high = std::max(high, partials.high[i * p.head_dim + c]);
    }
    // Rounded subtraction is monotonic: no value between the ends is farther from the mean.
    amax[c] = low > high ? 0 : std::max(std::abs(low - mean[c]), std::abs(high - mean[c]));
    if (!std::isfinite(amax[c])) return false;
  }
  return true;
}

void balance_of_head(const CalibrateParams& p, float* amax, float* balance) {
  const int64_t half = p.rotary_dim / 2;
  for (int64_t c = 0; c < half; ++c) amax[c] = amax[c + half] = std::max(amax[c], amax[c + half]);
  const float largest = *std::max_element(amax, amax + p.head_dim);
  for (int64_t c = 0; c < p.head_dim; ++c) {
    const float root = std::sqrt(amax[c] / largest);
    balance[c] = p.balance && largest > 0 ? std::max(root * std::sqrt(root), kMinBalance) : 1;
  }
}

}  // namespace

void calibrate(const CalibrateParams& p) {
  auto* kernel = KVCORE_ISA_SELECT(calibrate_kernel);
  auto* amax_kernel = KVCORE_ISA_SELECT(calibrate_amax_kernel);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t max_blocks = (p.kv_len + kPageTokens - 1) / kPageTokens;
  const int64_t max_tasks = (max_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  const auto sums = make_scratch<double>({heads, max_blocks, p.head_dim});
  const auto low = make_scratch<float>({heads, max_tasks, p.head_dim});
  const auto high = make_scratch<float>({heads, max_tasks, p.head_dim});
  const int64_t num_ranges = heads * max_tasks * p.head_dim;
  std::fill_n(low.get(), num_ranges, std::numeric_limits<float>::infinity());
  std::fill_n(high.get(), num_ranges, -std::numeric_limits<float>::infinity());
  // Blocks are counted from the first token that is not padding.
  const auto first_token = [&](int64_t head) {
    return p.left_padding != nullptr ? p.left_padding[head / p.kv_heads] : 0;
  };

  parallel_for(0, heads * max_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / max_tasks;
      const ChannelRange range{&low[task * p.head_dim], &high[task * p.head_dim]};
      const int64_t block_begin = task % max_tasks * kBlocksPerTask;
      for (int64_t block = block_begin; block < block_begin + kBlocksPerTask; ++block) {
        const int64_t token = first_token(head) + block * kPageTokens;
        if (token >= p.kv_len) break;
        kernel(p, head / p.kv_heads, head % p.kv_heads, token,
               std::min<int64_t>(token + kPageTokens, p.kv_len),
               &sums[(head * max_blocks + block) * p.head_dim], range);
      }
    }
  });

  for (int64_t head = 0; head < heads; ++head) {
    const int64_t num_tokens = p.kv_len - first_token(head);
    const Partials partials{.sums = sums.get() + head * max_blocks * p.head_dim,
                            .low = low.get() + head * max_tasks * p.head_dim,
                            .high = high.get() + head * max_tasks * p.head_dim,
                            .num_blocks = (num_tokens + kPageTokens - 1) / kPageTokens,
                            .num_tasks = max_tasks};
    float* mean = p.k_mean + head * p.head_dim;
    float amax[kMaxHeadDim];
    mean_of_head(p, partials, num_tokens, mean);
    if (!amax_of_head(p, partials, mean, amax)) {
      amax_kernel(p, head / p.kv_heads, head % p.kv_heads, first_token(head), p.kv_len, mean, amax);
    }
    balance_of_head(p, amax, p.k_balance + head * p.head_dim);
  }
}

}  // namespace kvcore::turbo::backend
