#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::backend {
namespace {

constexpr int64_t kTokensPerTask = 1024;

// gap * std of finite ranges; low and high are [head_dim].
float priority_of_head(const float* low, const float* high, int64_t head_dim) {
  double lowest = low[0], highest = high[0], sum = 0, squares = 0;
  for (int64_t c = 0; c < head_dim; ++c) {
    lowest = std::min<double>(lowest, low[c]);
    highest = std::max<double>(highest, high[c]);
    sum += static_cast<double>(high[c]) - low[c];
  }
  const double mean = sum / static_cast<double>(head_dim);
  for (int64_t c = 0; c < head_dim; ++c) {
    const double deviation = static_cast<double>(high[c]) - low[c] - mean;
    squares += deviation * deviation;
  }
  const double std = std::sqrt(squares / static_cast<double>(head_dim));
  return static_cast<float>((highest - lowest) * std);
}

}  // namespace

void head_priority(const HeadPriorityParams& p) {
  auto* kernel = KVCORE_ISA_SELECT(head_priority_kernel);
  const int64_t heads = p.batch * p.heads;
  const int64_t max_tasks = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
  const auto low = make_scratch<float>({heads, max_tasks, p.head_dim});
  const auto high = make_scratch<float>({heads, max_tasks, p.head_dim});
  const auto finite = make_scratch<bool>({heads, max_tasks});
  const int64_t num_ranges = heads * max_tasks * p.head_dim;
  std::fill_n(low.get(), num_ranges, std::numeric_limits<float>::infinity());
  std::fill_n(high.get(), num_ranges, -std::numeric_limits<float>::infinity());
  std::fill_n(finite.get(), heads * max_tasks, true);
  const auto first_token = [&](int64_t head) {
    return p.left_padding != nullptr ? p.left_padding[head / p.heads] : 0;
  };

  parallel_for(0, heads * max_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / max_tasks;
      const int64_t token = first_token(head) + task % max_tasks * kTokensPerTask;
      if (token >= p.tokens) continue;
      finite[task] = kernel(p, head / p.heads, head % p.heads, token,
                            std::min<int64_t>(token + kTokensPerTask, p.tokens),
                            {&low[task * p.head_dim], &high[task * p.head_dim]});
    }
  });

  for (int64_t head = 0; head < heads; ++head) {
    if (first_token(head) == p.tokens) {
      p.priority[head] = 0;
      continue;
    }
    // Into the first task's range, which exists: there is a token.
    float* lows = &low[head * max_tasks * p.head_dim];
    float* highs = &high[head * max_tasks * p.head_dim];
    bool all_finite = finite[head * max_tasks];
    for (int64_t task = 1; task < max_tasks; ++task) {
      all_finite = all_finite && finite[head * max_tasks + task];
      for (int64_t c = 0; c < p.head_dim; ++c) {
        lows[c] = std::min(lows[c], lows[task * p.head_dim + c]);
        highs[c] = std::max(highs[c], highs[task * p.head_dim + c]);
      }
    }
    p.priority[head] = all_finite ? priority_of_head(lows, highs, p.head_dim)
                                  : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace kvcore::turbo::backend
