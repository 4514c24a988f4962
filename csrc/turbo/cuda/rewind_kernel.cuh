// turbo_rewind: one launch, a CTA per (sequence, K|V, head).
#pragma once

#include "core/cuda/error_flags.cuh"
#include "turbo/cuda/arrivals.cuh"
#include "turbo/cuda/page_codes.cuh"

namespace kvcore::turbo {

template <int kSlabs>
struct RewindArguments {
  const int32_t* new_lens;  // [batch]
  Arrivals arrivals;        // a group for each sequence
  uint32_t* error_flags;
  DeviceStore<kSlabs> store;
};

/// As in append_tail_kernel, head_dim threads work on the page and a warp keeps the length.
template <int kSlabs>
__global__ void __launch_bounds__(kMaxHeadDim + kWarpSize)
    rewind_kernel(const __grid_constant__ RewindArguments<kSlabs> a) {
  const int head_dim = a.store.head_dim, thread = static_cast<int>(threadIdx.x);
  const int64_t members = ctas_of_sequence(a.store.kv_heads);
  const Lane lane = lane_of_cta(a.store.kv_heads);
  const int64_t old_len = a.store.seq_lens[lane.batch_idx], new_len = a.new_lens[lane.batch_idx];
  const bool lens_fit = old_len >= 0 && old_len <= max_seq_len(a.store);
  const bool fits = lens_fit && new_len >= 0 && new_len <= old_len;
  const int64_t page_idx = new_len / kPageTokens;
  // The open page, which is in the tail alone, needs nothing.
  bool reads_pool = fits && new_len % kPageTokens != 0 && page_idx < old_len / kPageTokens;
  const bool missing =
      reads_pool && !check_entries(a.store, lane.batch_idx, page_idx, page_idx + 1);
  uint8_t* slot = nullptr;
  if (reads_pool && a.store.kv_heads > 0) {
    slot = tail_block(a.store, lane.row, page_idx);
    reads_pool = reinterpret_cast<const BlockHeader*>(slot)->page_idx != page_idx;
  }
  // Behind it every thread has read the lengths and the header of the slot.
  const bool rejected = __syncthreads_or(!fits || missing) != 0;
  if (thread == 0 && rejected) {
    if (!lens_fit) report_error(a.error_flags, kErrorSeqLens);
    if (lens_fit && !fits) report_error(a.error_flags, kErrorNewLens);
    if (fits) report_error(a.error_flags, kErrorBlockTable);
  }
  if (thread >= head_dim) {
    if (all_arrived(a.arrivals, lane.batch_idx, members, blockIdx.x % members) && !rejected &&
        thread == head_dim) {
      a.store.seq_lens[lane.batch_idx] = static_cast<int32_t>(new_len);
    }
    return;
  }
  if (rejected || !reads_pool || slot == nullptr) return;
  const PoolBlock block = pool_block(a.store, lane.row, page_idx);
  const float scale = reinterpret_cast<const BlockHeader*>(block.data)->scale;
  write_header(slot, scale, static_cast<int32_t>(page_idx));
  store_codes8(load_block(block.data, lane.kv, block.bits, head_dim), lane.kv, head_dim, slot);
}

}  // namespace kvcore::turbo
