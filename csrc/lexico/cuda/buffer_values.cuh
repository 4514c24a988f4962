// The buffer's part of the output: its values are vectors, and are summed as they are.
#pragma once

#include "lexico/cuda/value_rows.cuh"

namespace kvcore::lexico {

// Rows whose sums a warp has in registers at a time; more would spill at head_dim 256.
constexpr int kBufferRows = 2;

template <int kRows>
struct BufferValuesSmem {
  RowFloats<kRows> weights[kBufferSegment];
  float sums[kValueWarps][kBufferRows * kMaxHeadDim];
};

/// out [kRows, head_dim]: a warp takes every 8th token, a lane every 32nd channel.
template <int kRows>
__device__ inline void add_buffer(const ValueInput<kRows>& in, int64_t first_token,
                                  BufferValuesSmem<kRows>& smem, float* out) {
  const AttentionParams& p = in.args.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim);
  const int begin = in.part.seen_begin(in.unit), end = in.part.seen_end(in.unit);
  float sums[kRows] = {};
  for (int token = begin + thread; token < end; token += kValueThreads) {
    smem.weights[token] = in.exponentials(token, sums);
  }
  in.block_sums(sums);
  in.write_sums(sums);

  const int64_t base =
      in.unit.batch_idx * p.v_buffer.batch_stride + in.unit.kv_head * p.v_buffer.head_stride;
  constexpr int kOfLane = kMaxHeadDim / kWarpSize;
  for (int first = 0; first < kRows; first += kBufferRows) {
    float o[kBufferRows][kOfLane] = {};
    for (int token = begin + warp; token < end; token += kValueWarps) {
      const int64_t at = base + (first_token + token) * p.v_buffer.token_stride;
      float value[kOfLane];
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int c = lane + i * kWarpSize;
        value[i] =
            c < head_dim ? load_element(p.v_buffer, at + c * p.v_buffer.channel_stride) : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kBufferRows; ++r) {
        // 0 * NaN is NaN: values that a row does not see must not reach its sum.
        if (!in.rows.keys.sees(first + r, token)) continue;
        const float weight = smem.weights[token].x[first + r];
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) o[r][i] = __fmaf_rn(weight, value[i], o[r][i]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kBufferRows; ++r) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int c = lane + i * kWarpSize;
        if (c < head_dim) smem.sums[warp][r * head_dim + c] = o[r][i];
      }
    }
    __syncthreads();
    for (int i = thread; i < kBufferRows * head_dim; i += kValueThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kValueWarps; ++w) sum += smem.sums[w][i];
      out[first * head_dim + i] = sum;
    }
  }
}

}  // namespace kvcore::lexico
