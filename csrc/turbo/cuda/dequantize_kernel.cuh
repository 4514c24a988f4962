// turbo_dequantize: a CTA per page of a head, and for every page that the longest possible sequence
// has and this one has not, one that zeroes 64 rows of padding.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "turbo/cuda/page_codes.cuh"

namespace kvcore::turbo {

template <int kSlabs>
struct DequantizeArguments {
  const float* k_balance;  // [batch, kv_heads, head_dim], may be null
  const float* k_mean;     // [batch, kv_heads, head_dim], may be null
  int64_t kv_len, ctas_per_head;
  bool right_align;
  void* out[2];  // of K and V: [batch, kv_heads, kv_len, head_dim]
  uint32_t* error_flags;
  DeviceStore<kSlabs> store;
};

/// `value` to rows [begin, end) of a head's output, at most 64.
template <class T>
__device__ inline void fill_rows(T* head, int64_t begin, int64_t end, int head_dim, float value) {
  const TilePlace place = tile_place();
  const float x[kTileChannels] = {value, value, value, value};
  for (int i = 0; i < kTileTokens; ++i) {
    const int64_t row = begin + place.token() + i;
    if (row < end) store_channels(head + row * head_dim, place.channel(), x);
  }
}

template <class T, int kSlabs>
__global__ void __launch_bounds__(kMaxHeadDim)
    dequantize_kernel(const __grid_constant__ DequantizeArguments<kSlabs> a) {
  const int head_dim = a.store.head_dim;
  const Lane lane = lane_of_row(blockIdx.x / a.ctas_per_head, a.store.kv_heads);
  const int64_t part = blockIdx.x % a.ctas_per_head;
  const int64_t head = lane.batch_idx * a.store.kv_heads + lane.head_idx;
  T* out = static_cast<T*>(a.out[lane.kv]) + head * a.kv_len * head_dim;

  const int64_t seq_len = a.store.seq_lens[lane.batch_idx];
  if (seq_len < 0 || seq_len > max_seq_len(a.store) || seq_len > a.kv_len) {
    if (threadIdx.x == 0) report_error(a.error_flags, kErrorSeqLens);
    return fill_rows(out, part * kPageTokens, min(a.kv_len, (part + 1) * kPageTokens), head_dim,
                     NAN);
  }
  const int64_t num_pages = (seq_len + kPageTokens - 1) / kPageTokens;
  if (part >= num_pages) {
    // Rows without a token come before those that have one, or after them.
    const int64_t begin = (part - num_pages) * kPageTokens, padding = a.kv_len - seq_len;
    const int64_t end = min(padding, begin + kPageTokens), shift = a.right_align ? 0 : seq_len;
    return fill_rows(out, shift + begin, shift + end, head_dim, 0);
  }

  const int64_t first = (a.right_align ? a.kv_len - seq_len : 0) + part * kPageTokens;
  const int64_t left = seq_len - part * kPageTokens;
  const PoolBlock block = left >= kPageTokens ? pool_block(a.store, lane.row, part)
                                              : PoolBlock{tail_block(a.store, lane.row, part), 8};
  if (block.data == nullptr) {
    if (threadIdx.x == 0) report_error(a.error_flags, kErrorBlockTable);
    return fill_rows(out, first, first + kPageTokens, head_dim, NAN);
  }
  const float scale = reinterpret_cast<const BlockHeader*>(block.data)->scale;
  const CodeTile codes = load_block(block.data, lane.kv, block.bits, head_dim);
  const TilePlace place = tile_place();
  const bool calibrated = lane.kv == 0;
  float balance[kTileChannels], mean[kTileChannels];
  const bool balanced = calibrated && a.k_balance != nullptr;
  const bool shifted = calibrated && a.k_mean != nullptr;
#pragma unroll
  for (int j = 0; j < kTileChannels; ++j) {
    const int64_t channel = head * head_dim + place.channel() + j;
    balance[j] = balanced ? a.k_balance[channel] : 1;
    mean[j] = shifted ? a.k_mean[channel] : 0;
  }
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    const int token = place.token() + i;
    if (token >= left) continue;
    float x[kTileChannels];
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      // Exact: minus 2^23 and the bias of the code.
      x[j] = (biased_byte(codes.word[i] ^ 0x80808080u, j) - (0x1p23f + 128)) * scale;
      if (balanced) x[j] *= balance[j];
      if (shifted) x[j] += mean[j];
    }
    store_channels(out + (first + token) * head_dim, place.channel(), x);
  }
}

}  // namespace kvcore::turbo
