// A tile of a state in the registers of a CTA: all k_dim keys by kStepColumns value channels.
//
// Two classes, one for each layout of a state in memory. Both do
//   load, store   16 bytes at a time; a warp's load is 4 runs of 128 bytes
//   step          one token: k^T S and q^T S in one pass over the registers, then u, the output
//                 e^g q^T S + (q . k) u, and S <- e^g S + k u
// Tails (v_dim or k_dim no multiple of 32) leave lanes without memory: they hold zeros.
#pragma once

#include "core/cuda/copy.cuh"
#include "core/cuda/rows.cuh"
#include "gdn/cuda/heuristics.h"

namespace kvcore::gdn {

constexpr int kStepWarps = kStepThreads / kWarpSize;
constexpr int kStepRuns = 4;                          // of 128 bytes, in a load of a warp
constexpr int kStepRunLanes = kWarpSize / kStepRuns;  // lanes of 16 bytes each
static_assert(kStepRunLanes * 4 == kStepColumns);

/// What the step needs of one token, in shared memory. q has the scale in it.
struct StepToken {
  const float *q, *k;  // [k_dim]
  const float* v;      // [kStepColumns]
  float decay, beta, qk;
};

struct StepShape {
  int k_dim, v_dim;
  int v_begin;  // first value channel of the tile
};

__device__ inline void load_floats(const float* address, float (&x)[4]) {
  const uint4 bits = load_16(address);
  x[0] = __uint_as_float(bits.x);
  x[1] = __uint_as_float(bits.y);
  x[2] = __uint_as_float(bits.z);
  x[3] = __uint_as_float(bits.w);
}
__device__ inline void store_floats(float* address, const float (&x)[4]) {
  store_16(address, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                     __float_as_uint(x[3])});
}

/// [k_dim, v_dim] states. A lane has 4 neighbouring value channels of every 16th key, so that the
/// sums over keys take two shuffles and a meeting of the warps.
template <int kLoads>
class KFirstTile {
 public:
  static constexpr int kSmemFloats = 2 * kStepWarps * 2 * kStepColumns;

  __device__ explicit KFirstTile(const StepShape& shape) : shape_(shape) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    row_ = static_cast<int>(threadIdx.x) / kWarpSize * kStepRuns + lane / kStepRunLanes;
    column_ = lane % kStepRunLanes * 4;
    inside_ = shape.v_begin + column_ < shape.v_dim;
  }

  __device__ void load(const float* state) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s_[i][c] = 0.0f;
      if (has_row(i)) load_floats(state + offset(i), s_[i]);
    }
  }

  __device__ void store(float* state) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (has_row(i)) store_floats(state + offset(i), s_[i]);
    }
  }

  /// out: the output's 4 channels from column() on, in threads that write_out() says. `scratch`
  /// holds kSmemFloats; it is used in turn, so that one barrier a token is enough.
  __device__ void step(const StepToken& token, float* scratch, int parity, float (&out)[4]) {
    float sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (16 * i >= shape_.k_dim) break;
      const float k = token.k[16 * i + row_], q = token.q[16 * i + row_];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[0][c] = __fmaf_rn(k, s_[i][c], sums[0][c]);
        sums[1][c] = __fmaf_rn(q, s_[i][c], sums[1][c]);
      }
    }
    float* const partial = scratch + parity * (kSmemFloats / 2);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& x = sums[which][c];
        x += __shfl_xor_sync(kAllLanes, x, 2 * kStepRunLanes);
        x += __shfl_xor_sync(kAllLanes, x, kStepRunLanes);
      }
      if (row_ % kStepRuns == 0) {
        store_floats(partial + (row_ / kStepRuns * 2 + which) * kStepColumns + column_,
                     sums[which]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int warp = 0; warp < kStepWarps; ++warp) {
        float part[4];
        load_floats(partial + (warp * 2 + which) * kStepColumns + column_, part);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[which][c] = warp == 0 ? part[c] : sums[which][c] + part[c];
      }
    }
    float u[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      u[c] = token.beta * __fmaf_rn(-token.decay, sums[0][c], token.v[column_ + c]);
      out[c] = __fmaf_rn(token.decay, sums[1][c], token.qk * u[c]);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (16 * i >= shape_.k_dim) break;
      const float k = token.k[16 * i + row_];
#pragma unroll
      for (int c = 0; c < 4; ++c) s_[i][c] = __fmaf_rn(token.decay, s_[i][c], k * u[c]);
    }
  }

  /// f(column, value) for the outputs that this thread has to write, after step().
  template <class F>
  __device__ void for_each_output(const float (&out)[4], F&& f) const {
    if (row_ != 0 || !inside_) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) f(column_ + c, out[c]);
  }

 private:
  __device__ bool has_row(int i) const { return inside_ && 16 * i < shape_.k_dim; }
  __device__ int offset(int i) const {
    return (16 * i + row_) * shape_.v_dim + shape_.v_begin + column_;
  }

  StepShape shape_;
  int row_, column_;
  bool inside_;
  float s_[kLoads][4];
};

/// [v_dim, k_dim] states. 8 lanes have a value channel, 4 neighbouring keys of every 32, so that
/// the sums over keys stay in the warp; a lane has two value channels.
template <int kLoads>
class VFirstTile {
 public:
  static constexpr int kSmemFloats = 0;

  __device__ explicit VFirstTile(const StepShape& shape) : shape_(shape) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    row_ = static_cast<int>(threadIdx.x) / kWarpSize * kRows * kStepRuns + lane / kStepRunLanes;
    key_ = lane % kStepRunLanes * 4;
  }

  __device__ void load(const float* state) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s_[r][i][c] = 0.0f;
        if (has(r, i)) load_floats(state + offset(r, i), s_[r][i]);
      }
    }
  }

  __device__ void store(float* state) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (has(r, i)) store_floats(state + offset(r, i), s_[r][i]);
      }
    }
  }

  __device__ void step(const StepToken& token, float*, int, float (&out)[4]) {
    float ks[kRows] = {}, qs[kRows] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!has_keys(i)) continue;
      float k[4], q[4];
      load_floats(token.k + 32 * i + key_, k);
      load_floats(token.q + 32 * i + key_, q);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          ks[r] = __fmaf_rn(k[c], s_[r][i][c], ks[r]);
          qs[r] = __fmaf_rn(q[c], s_[r][i][c], qs[r]);
        }
      }
    }
    float u[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ks[r] = warp_sum<kStepRunLanes>(ks[r]);
      qs[r] = warp_sum<kStepRunLanes>(qs[r]);
      u[r] = token.beta * __fmaf_rn(-token.decay, ks[r], token.v[row_ + r * kStepRuns]);
      out[r] = __fmaf_rn(token.decay, qs[r], token.qk * u[r]);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!has_keys(i)) continue;
      float k[4];
      load_floats(token.k + 32 * i + key_, k);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s_[r][i][c] = __fmaf_rn(token.decay, s_[r][i][c], k[c] * u[r]);
        }
      }
    }
  }

  template <class F>
  __device__ void for_each_output(const float (&out)[4], F&& f) const {
    if (key_ != 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (has_row(r)) f(row_ + r * kStepRuns, out[r]);
    }
  }

 private:
  static constexpr int kRows = 2;
  static constexpr int kChunks = kLoads / kRows;
  static_assert(kStepWarps * kStepRuns * kRows == kStepColumns);

  __device__ bool has_row(int r) const {
    return shape_.v_begin + row_ + r * kStepRuns < shape_.v_dim;
  }
  __device__ bool has_keys(int i) const { return 32 * i + key_ < shape_.k_dim; }
  __device__ bool has(int r, int i) const { return has_row(r) && has_keys(i); }
  __device__ int offset(int r, int i) const {
    return (shape_.v_begin + row_ + r * kStepRuns) * shape_.k_dim + 32 * i + key_;
  }

  StepShape shape_;
  int row_, key_;
  float s_[kRows][kChunks][4];
};

}  // namespace kvcore::gdn
