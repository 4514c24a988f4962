// turbo_append. Two kernels, or three when pages can be neither first nor among the last two:
//
//   append_plan_kernel   a CTA per sequence: what is appended, or that the call says nonsense
//   append_page_kernel   a CTA per page that leaves no trace in the tail
//   append_tail_kernel   a CTA per (sequence, K|V, head): all other pages, in order, and the state
//
// Up to 128 tokens are one launch of append_tail_kernel, which then plans for itself. A decode
// step, one token, has a variant of its own without the loop over pages: from such a loop the
// compiler moves so much into registers that an SM holds half as many CTAs. It moves, per
// (sequence, K|V, head), the row, the codes of the row and some 100 bytes of state; every 64th
// token also the tail block and the block of the pool.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "turbo/cuda/arrivals.cuh"
#include "turbo/cuda/page_codes.cuh"

namespace kvcore::turbo {

/// What an append does to one sequence.
struct AppendPlan {
  int64_t padding;  // leading new tokens that are left out
  int64_t begin;    // first position that is written: tokens stored before
  int64_t end;      // one past the last; before begin if the sequence is rejected

  __device__ bool rejected() const { return end < begin; }
  __device__ int64_t first_page() const { return begin / kPageTokens; }
  __device__ int64_t last_page() const { return (end - 1) / kPageTokens; }
  // Pages [bulk_begin, bulk_end) are new, full and not among the last two touched.
  __device__ int64_t bulk_begin() const { return (begin + kPageTokens - 1) / kPageTokens; }
  __device__ int64_t bulk_end() const {
    return last_page() - 1 > bulk_begin() ? last_page() - 1 : bulk_begin();
  }
};
/// Without more new tokens no page is a bulk page.
constexpr int64_t kMaxTokensWithoutBulk = 2 * kPageTokens;

template <int kSlabs>
struct AppendArguments {
  DeviceRows rows[2];  // of K and V
  int64_t num_new;
  const int32_t* left_padding;  // [batch], may be null
  const float* k_balance;       // [batch, kv_heads, head_dim], may be null
  const float* k_mean;          // [batch, kv_heads, head_dim], may be null
  float tail_margin;
  float* tail_scale;                // [batch, 2, kv_heads]
  unsigned long long* clamp_count;  // [batch, 2, kv_heads]
  AppendPlan* plans;                // [batch], null if append_tail_kernel plans for itself
  float* page_amax;                 // [batch, 2, kv_heads, max_bulk_pages]
  int64_t max_bulk_pages;
  Arrivals arrivals;  // a group for each sequence
  uint32_t* error_flags;
  DeviceStore<kSlabs> store;
};

/// Checks everything that the append of a sequence reads from device tensors before anything is
/// written. Meets all threads of the CTA; all get the same plan.
template <int kSlabs>
__device__ inline AppendPlan plan_append(const AppendArguments<kSlabs>& a, int64_t batch_idx) {
  const int64_t begin = a.store.seq_lens[batch_idx];
  const int64_t padding = a.left_padding != nullptr ? a.left_padding[batch_idx] : 0;
  const AppendPlan plan{padding, begin, begin + a.num_new - padding};
  const bool padding_fits = padding >= 0 && padding <= a.num_new;
  const bool lens_fit = begin >= 0 && begin <= max_seq_len(a.store);
  const bool fits = padding_fits && lens_fit && plan.end <= max_seq_len(a.store);
  // The pages that become full have entries; the open tail needs none.
  const bool missing =
      fits && !check_entries(a.store, batch_idx, begin / kPageTokens, plan.end / kPageTokens);
  const bool any_missing = __syncthreads_or(missing) != 0;
  if (threadIdx.x == 0) {
    if (!padding_fits) report_error(a.error_flags, kErrorLeftPadding);
    if (padding_fits && !fits) report_error(a.error_flags, kErrorSeqLens);
    if (any_missing) report_error(a.error_flags, kErrorBlockTable);
  }
  return fits && !any_missing ? plan : AppendPlan{0, 0, -1};
}

template <int kSlabs>
__global__ void append_plan_kernel(const __grid_constant__ AppendArguments<kSlabs> a) {
  const AppendPlan plan = plan_append(a, blockIdx.x);
  if (threadIdx.x == 0) a.plans[blockIdx.x] = plan;
}

/// The rows of a page: token 0 is at an element offset of the view, and may lie before it.
template <int kSlabs>
__device__ inline int64_t page_offset(const AppendArguments<kSlabs>& a, const AppendPlan& plan,
                                      const Lane& lane, int64_t page_idx) {
  const DeviceRows& rows = a.rows[lane.kv];
  const int64_t token = plan.padding + page_idx * kPageTokens - plan.begin;
  return rows.head(lane.batch_idx, lane.head_idx) + token * rows.token_stride;
}

template <int kSlabs>
__device__ inline TileCalibration calibration_of(const AppendArguments<kSlabs>& a,
                                                 const Lane& lane) {
  if (lane.kv == 1) return {nullptr, nullptr};
  const int64_t head = (lane.batch_idx * a.store.kv_heads + lane.head_idx) * a.store.head_dim;
  return {a.k_mean != nullptr ? a.k_mean + head : nullptr,
          a.k_balance != nullptr ? a.k_balance + head : nullptr};
}

/// The scale of a page whose tokens are all new.
__device__ inline float scale_of_page(const Magnitude& magnitude) {
  return magnitude.first_nonfinite < kPageTokens ? quiet_nan() : code_scale(magnitude.amax);
}

template <class T, int kSlabs>
__global__ void __launch_bounds__(kMaxHeadDim)
    append_page_kernel(const __grid_constant__ AppendArguments<kSlabs> a) {
  const Lane lane = lane_of_row(blockIdx.x / a.max_bulk_pages, a.store.kv_heads);
  const AppendPlan plan = a.plans[lane.batch_idx];
  if (plan.rejected() || plan.begin == plan.end) return;
  const int64_t page_idx = plan.bulk_begin() + blockIdx.x % a.max_bulk_pages;
  if (page_idx >= plan.bulk_end()) return;
  const int head_dim = a.store.head_dim;
  const RowTile tile =
      load_tile<T>(a.rows[lane.kv], page_offset(a, plan, lane, page_idx), calibration_of(a, lane));
  const Magnitude size = page_magnitude(tile, head_dim, 0);
  const float scale = scale_of_page(size);
  store_block(quantize_tile(tile, scale), lane.kv, head_dim, scale,
              pool_block(a.store, lane.row, page_idx));
  if (threadIdx.x == 0) a.page_amax[blockIdx.x] = size.amax;
}

/// Largest magnitude of a lane's bulk pages; meets the lanes of each warp, and each warp looks at
/// all of them.
template <int kSlabs>
__device__ inline float bulk_amax(const AppendArguments<kSlabs>& a, const AppendPlan& plan,
                                  const Lane& lane) {
  const int64_t pages = plan.bulk_end() - plan.bulk_begin();
  float amax = 0;
  for (int64_t i = threadIdx.x % 32; i < pages; i += 32) {
    amax = fmaxf(amax, a.page_amax[lane.row * a.max_bulk_pages + i]);
  }
  return warp_max(amax);
}

/// Writes the codes of one token of an 8-bit block.
__device__ inline void store_token8(uint32_t codes, int token, int kv, int head_dim,
                                    uint8_t* block) {
  const int channel = tile_place().channel();
  uint8_t* out = block + code_offset(8, head_dim);
  if (kv == 0) {
    *reinterpret_cast<uint32_t*>(out + k_code_position(8, token, channel).byte) = codes;
  } else {
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      out[v_code_position(8, token, channel + j, head_dim).byte] =
          static_cast<uint8_t>(codes >> 8 * j);
    }
  }
}

/// The universal scale of a lane while its pages are appended.
struct TailScale {
  float amax;   // of the new tokens so far
  float scale;  // tail_scale

  /// All new tokens are known with the last page; only that one can be opened, with the scale that
  /// they lead to. Every thread does the same, one writes.
  __device__ void update(const Magnitude& magnitude, bool is_last, float margin, float* out) {
    amax = fmaxf(amax, magnitude.amax);
    if (!is_last) return;
    const float wanted = code_scale(amax) * margin;
    if (!(wanted > scale)) return;
    scale = wanted;
    if (threadIdx.x == 0) *out = wanted;
  }
};

/// The new tokens [first, last) of a page into its tail slot; returns the scale of the block. Codes
/// are written by the threads whose tiles they are in.
template <class T, int kRows, int kSlabs>
__device__ inline float append_to_slot(const AppendArguments<kSlabs>& a, const AppendPlan& plan,
                                       const Lane& lane, int64_t page_idx, int first, int last,
                                       uint8_t* slot, int turn, TailScale& tail) {
  const int head_dim = a.store.head_dim;
  const bool opens = first == 0, is_whole = last - first == kPageTokens;
  // Read by all threads before one can write it: page_magnitude() is a barrier.
  float scale = opens ? 0 : reinterpret_cast<const BlockHeader*>(slot)->scale;
  const TileCalibration calibration = calibration_of(a, lane);
  const int64_t offset = page_offset(a, plan, lane, page_idx);
  Magnitude own;
  for_each_row<T, kRows>(a.rows[lane.kv], offset, first, last, calibration,
                         [&](int token, const float (&x)[kTileChannels]) { own.add(token, x); });
  const Magnitude size = page_magnitude(own, head_dim, turn);
  tail.update(size, page_idx == plan.last_page(), a.tail_margin, a.tail_scale + lane.row);
  if (opens) {
    scale = is_whole ? scale_of_page(size) : tail.scale;
    if (!is_whole) store_codes8({}, lane.kv, head_dim, slot);
  }

  const bool poisoned = scale != scale;
  int clamped = 0;
  // The rows again, from the cache: keeping those of a page would take the registers of other warps
  // in the case that matters, which is one token.
  for_each_row<T, kRows>(a.rows[lane.kv], offset, first, last, calibration,
                         [&](int token, const float (&x)[kTileChannels]) {
                           // The scale of a block is NaN from behind the token that is not finite.
                           const bool coded = !poisoned && token <= size.first_nonfinite;
                           const uint32_t codes = coded ? clamped_codes(x, scale, clamped) : 0;
                           store_token8(codes, token, lane.kv, head_dim, slot);
                         });
  clamped = warp_sum(clamped);
  if (threadIdx.x % kWarpSize == 0 && clamped > 0) atomicAdd(a.clamp_count + lane.row, clamped);
  const bool poisons = !poisoned && size.first_nonfinite < kPageTokens;
  if (poisons) scale = quiet_nan();
  if (opens) {
    write_header(slot, scale, static_cast<int32_t>(page_idx));
  } else if (poisons && threadIdx.x == 0) {
    reinterpret_cast<BlockHeader*>(slot)->scale = scale;
  }
  return scale;
}

// Two CTAs an SM are asked for: by itself the compiler aims at three for one token, and spills.
template <class T, int kSlabs, bool kOneToken>
__global__ void __launch_bounds__(kMaxHeadDim + kWarpSize, kOneToken ? 2 : 1)
    append_tail_kernel(const __grid_constant__ AppendArguments<kSlabs> a) {
  const int64_t members = ctas_of_sequence(a.store.kv_heads);
  const Lane lane = lane_of_cta(a.store.kv_heads);
  const bool is_planned = !kOneToken && a.plans != nullptr;
  const AppendPlan plan = is_planned ? a.plans[lane.batch_idx] : plan_append(a, lane.batch_idx);
  const int head_dim = a.store.head_dim, thread = static_cast<int>(threadIdx.x);
  // One warp more than works on the tiles keeps the length, while they wait for their rows.
  if (thread >= head_dim) {
    if (all_arrived(a.arrivals, lane.batch_idx, members, blockIdx.x % members) &&
        !plan.rejected() && thread == head_dim) {
      a.store.seq_lens[lane.batch_idx] = static_cast<int32_t>(plan.end);
    }
    return;
  }
  if (plan.rejected() || plan.begin == plan.end || a.store.kv_heads == 0) return;

  TailScale tail{is_planned ? bulk_amax(a, plan, lane) : 0, a.tail_scale[lane.row]};
  int64_t page_idx = plan.first_page();
  int turn = 0;
  do {
    if (page_idx == plan.bulk_begin()) page_idx = plan.bulk_end();
    const int64_t page_begin = page_idx * kPageTokens, left = plan.end - page_begin;
    const int first = plan.begin > page_begin ? static_cast<int>(plan.begin - page_begin) : 0;
    const int last = left < kPageTokens ? static_cast<int>(left) : kPageTokens;
    uint8_t* slot = tail_block(a.store, lane.row, page_idx);
    const float scale = append_to_slot<T, kOneToken ? 1 : 4>(a, plan, lane, page_idx, first, last,
                                                             slot, turn++, tail);
    if (last == kPageTokens) {
      store_block(load_block(slot, lane.kv, 8, head_dim), lane.kv, head_dim, scale,
                  pool_block(a.store, lane.row, page_idx));
    }
  } while (!kOneToken && ++page_idx <= plan.last_page());
}

}  // namespace kvcore::turbo
