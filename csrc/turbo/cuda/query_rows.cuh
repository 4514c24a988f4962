// Query rows of one kv head: reading, balancing and quantizing them, and what each of them sees.
//
// A row is one query token of one query head, token-major: row = token * group + head % group, so
// that the query heads that share K and V share a tile.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/elements.cuh"
#include "core/cuda/reduce.cuh"
#include "turbo/cuda/softmax.cuh"
#include "turbo/params.h"

namespace kvcore::turbo {

/// The rows of a CTA and where they come from and go to.
struct RowSource {
  InputView q;     // [batch, q_heads, q_len, head_dim]
  OutputView out;  // [batch, q_heads, q_tokens, head_dim]
  float* lse;      // [batch, q_heads, q_tokens]
  int64_t batch_idx;
  int64_t kv_head;
  int64_t group;  // q_heads / kv_heads
  int64_t q_heads, q_tokens;
  int64_t first_token;    // of q: where the sequence begins (packed sequences)
  int64_t q_len, kv_len;  // of this sequence
  int64_t first_row;      // in [0, q_len * group)
  int num_rows;
  const float* k_balance;  // [head_dim] of the kv head, may be null
  const float* k_mean;     // [head_dim], may be null

  __device__ int64_t token(int row) const { return (first_row + row) / group; }
  __device__ int64_t head(int row) const { return kv_head * group + (first_row + row) % group; }
  /// Index of a row in lse; times head_dim, in out.
  __device__ int64_t output_index(int row) const {
    return (batch_idx * q_heads + head(row)) * q_tokens + first_token + token(row);
  }
};

__device__ inline const float* calibration_row(const float* rows, int64_t batch_idx,
                                               int64_t kv_heads, int64_t head, int head_dim) {
  return rows == nullptr ? nullptr : rows + (batch_idx * kv_heads + head) * head_dim;
}

/// Bytes from one row of Q8 in shared memory to the next: 16 more than the row, so that the eight
/// rows of an 8x16-byte matrix lie in different banks.
constexpr int q_row_stride(int head_dim) { return head_dim + 16; }

/// Quantized rows in shared memory.
template <int kHeadDim, int kRows>
struct QueryTile {
  int8_t q8[kRows * q_row_stride(kHeadDim)];
  float factor[kRows];     // s_Q * scale * log2(e), made positive: its sign is in the codes
  float mean_term[kRows];  // scale * sum_c q[c] * mean[c], what lse lacks
  int first_key[kRows];    // the row sees keys [first_key, end_key)
  int end_key[kRows];
  int finite[kRows];  // whether all of the query is

  __device__ bool sees_page(int row, int64_t page_first) const {
    return first_key[row] < page_first + kPageTokens && end_key[row] > page_first &&
           first_key[row] < end_key[row];
  }
  /// What a lane that has rows `row` and `row + 8` starts with. A row that does not exist has a
  /// maximum that no score reaches: all its P are 0, and it never keeps a page from being skipped.
  template <int kHalves>
  __device__ LaneRows<kHalves> lane_rows(int row, int num_rows) const {
    LaneRows<kHalves> lane;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int r = row + 8 * h;
      lane.m[h] = r < num_rows ? negative_infinity() : 1e30f;
      lane.l[h] = 0.0f;
    }
    return lane;
  }
};

/// Row `row` of the tile, by a whole warp. Rows past source.num_rows become zeros that see nothing.
template <int kHeadDim, int kRows>
__device__ inline void load_query_row(const RowSource& source, const Softmax& softmax, int row,
                                      QueryTile<kHeadDim, kRows>& tile) {
  constexpr int kOfLane = kHeadDim / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int8_t* codes = tile.q8 + row * q_row_stride(kHeadDim);
  if (row >= source.num_rows) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) codes[lane + kWarpSize * i] = 0;
    if (lane == 0) {
      tile.factor[row] = tile.mean_term[row] = 0.0f;
      tile.first_key[row] = tile.end_key[row] = 0;
      tile.finite[row] = 1;
    }
    return;
  }
  const int64_t token = source.token(row);
  const int64_t at = source.batch_idx * source.q.batch_stride +
                     source.head(row) * source.q.head_stride +
                     (source.first_token + token) * source.q.token_stride;
  float x[kOfLane], mean_sum = 0.0f, top = 0.0f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int channel = lane + kWarpSize * i;
    x[i] = load_element(source.q, at + channel * source.q.channel_stride);
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int channel = lane + kWarpSize * i;
    if (source.k_mean != nullptr) mean_sum = __fmaf_rn(x[i], source.k_mean[channel], mean_sum);
    if (source.k_balance != nullptr) x[i] = __fmul_rn(x[i], source.k_balance[channel]);
    finite = finite && fabsf(x[i]) < __int_as_float(0x7f800000);
    top = fmaxf(top, fabsf(x[i]));
  }
  finite = __all_sync(kAllLanes, finite) != 0;
  mean_sum = warp_sum(mean_sum);
  const float s_q = fmaxf(__fdiv_rn(warp_max(top), kCodeMax), 0x1p-126f);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int code = finite ? __float2int_rn(__fdiv_rn(x[i], s_q)) : 0;
    codes[lane + kWarpSize * i] = static_cast<int8_t>(softmax.scale < 0.0f ? -code : code);
  }
  if (lane == 0) {
    int64_t end = source.kv_len, first = 0;
    if (softmax.causal) {
      end = token + 1 + source.kv_len - source.q_len;
      if (softmax.window > 0) first = end - softmax.window;
    }
    tile.factor[row] = finite ? s_q * fabsf(softmax.scale) * kLog2e : 0.0f;
    tile.mean_term[row] = source.k_mean != nullptr ? softmax.scale * mean_sum : 0.0f;
    tile.first_key[row] = static_cast<int>(max(first, int64_t{0}));
    tile.end_key[row] = static_cast<int>(max(end, int64_t{0}));
    tile.finite[row] = finite;
  }
}

/// The A fragment of channels [32 chunk, ..) of rows [row, row + 16), of which the last 8 are left
/// out (zeros) with kHalves = 1.
template <int kHalves, int kHeadDim, int kRows>
__device__ __forceinline__ void load_query_fragment(const QueryTile<kHeadDim, kRows>& tile, int row,
                                                    int chunk, uint32_t (&q8)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int8_t* codes = tile.q8 + row * q_row_stride(kHeadDim) + chunk * kChunk;
  if constexpr (kHalves == 1) {
    uint32_t half[2];
    ldmatrix_x2(half, codes + lane % 8 * q_row_stride(kHeadDim) + lane / 8 % 2 * 16);
    q8[0] = half[0];
    q8[1] = 0;
    q8[2] = half[1];
    q8[3] = 0;
  } else {
    ldmatrix_x4(q8, codes + lane % 16 * q_row_stride(kHeadDim) + lane / 16 * 16);
  }
}

template <class T>
__device__ __forceinline__ void store_elements(void* out, int64_t at, const float (&x)[4]) {
  T* const elements = static_cast<T*>(out) + at;
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(elements) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *reinterpret_cast<uint2*>(elements) =
        make_uint2(pack_floats<T>(x[0], x[1]), pack_floats<T>(x[2], x[3]));
  }
}

/// Four neighbouring channels of an output whose rows have a multiple of four.
__device__ inline void store_four(const OutputView& out, int64_t at, const float (&x)[4]) {
  switch (out.dtype) {
    case Dtype::kFloat16:
      return store_elements<Half>(out.data, at, x);
    case Dtype::kBFloat16:
      return store_elements<BFloat16>(out.data, at, x);
    default:
      return store_elements<float>(out.data, at, x);
  }
}

/// lse of a row, and the factor that makes its sums outputs: 0 and -inf for a row without keys, NaN
/// for a poisoned one, whose l is.
struct RowResult {
  float lse, factor;
};
__device__ inline RowResult finish_row(float m, float l, float mean_term) {
  if (l == 0.0f) return {negative_infinity(), 0.0f};
  return {m * kLn2 + logf(l) + mean_term, 1.0f / l};
}

}  // namespace kvcore::turbo
