// Launches of append_kernel.cuh.
#pragma once

#include <algorithm>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "turbo/cuda/append_kernel.cuh"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo {

template <class T, int kSlabs>
void launch_append(const AppendParams& p) {
  const Store& s = p.store;
  const int64_t ctas = s.batch * ctas_of_sequence(s.kv_heads);
  Scratch words(byte_count({ctas, sizeof(unsigned long long)}));
  AppendArguments<kSlabs> a{
      .rows = {device_rows(p.k), device_rows(p.v)},
      .num_new = p.num_new,
      .left_padding = p.left_padding,
      .k_balance = p.calibration.k_balance,
      .k_mean = p.calibration.k_mean,
      .tail_margin = p.tail_margin,
      .tail_scale = p.tail_scale,
      .clamp_count = reinterpret_cast<unsigned long long*>(p.clamp_count),
      .plans = nullptr,
      .page_amax = nullptr,
      .max_bulk_pages = 0,
      .arrivals = {reinterpret_cast<unsigned long long*>(words.data()), arrivals_key()},
      .error_flags = error_flags(),
      .store = device_store<kSlabs>(s)};
  const int head_dim = a.store.head_dim;
  const cudaStream_t stream = current_stream();
  const auto launch_tail = [&](auto* kernel) {
    launch(kernel, grid_of(ctas), head_dim + kWarpSize, kMagnitudeBytes, stream, a);
  };
  if (p.num_new == 1) return launch_tail(append_tail_kernel<T, kSlabs, true>);
  if (p.num_new <= kMaxTokensWithoutBulk) return launch_tail(append_tail_kernel<T, kSlabs, false>);

  // A sequence that begins with a page has one page more than fits in n tokens, one that does not
  // up to two more; the first, if it is not new, and the last two are not bulk pages. A sequence
  // with more pages than the table is rejected.
  a.max_bulk_pages = std::min(p.num_new / kPageTokens - 1, s.max_pages);
  const int64_t pages = s.batch * 2 * s.kv_heads * a.max_bulk_pages;
  Scratch plans(byte_count({s.batch, sizeof(AppendPlan)}));
  Scratch page_amax(byte_count({s.batch, 2 * s.kv_heads, a.max_bulk_pages, sizeof(float)}));
  a.plans = reinterpret_cast<AppendPlan*>(plans.data());
  a.page_amax = reinterpret_cast<float*>(page_amax.data());
  constexpr int kPlanThreads = 512;  // they read all entries of a sequence that will be written
  launch(append_plan_kernel<kSlabs>, grid_of(s.batch), kPlanThreads, 0, stream, a);
  if (pages > 0) {
    launch(append_page_kernel<T, kSlabs>, grid_of(pages), head_dim, kMagnitudeBytes, stream, a);
  }
  launch_tail(append_tail_kernel<T, kSlabs, false>);
}

template <class T>
void launch_append(const AppendParams& p) {
  dispatch_slabs(p.store.num_slabs, [&](auto slabs) { launch_append<T, slabs()>(p); });
}

}  // namespace kvcore::turbo
