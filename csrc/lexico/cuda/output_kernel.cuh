// From weights of V's atoms to outputs: W D_v^T in parts of 64 atoms, then the sum of the parts.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/online_softmax.cuh"
#include "core/cuda/reduce.cuh"
#include "lexico/cuda/attention_args.cuh"

namespace kvcore::lexico {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / kWarpSize;
constexpr int kRowsOfWarp = kProductRows / kProductWarps;
static_assert(kRowsOfWarp == 4);
constexpr int kFinishRows = 4;  // of a CTA, a warp each
// For sm_120 nvcc would aim at more of them, and spill for it.
constexpr int kFinishCtas = 4;

struct ProductSmem {
  alignas(16) float weights[kProductAtoms][kProductRows];
  float atoms[kWarpSize][kMaxHeadDim];
};

/// The coded segments of a unit that some row sees: two runs of them, [begin, end) of blocks and of
/// the tail's, are those that the value pass has written.
__device__ inline void seen_segments(const AttentionArgs& args, const Unit& unit,
                                     int64_t (&begin)[2], int64_t (&end)[2]) {
  const Segments& all = args.plan.segments;
  begin[0] = begin[1] = end[0] = end[1] = 0;
  if (unit.error != 0 || unit.span.begin >= unit.span.end) return;
  const int64_t tail = all.blocks * kBlockTokens, coded = tail + unit.tail_len;
  const int64_t first = unit.span.begin, last = unit.span.end;
  begin[0] = min(first / kBlockTokens, all.blocks);
  end[0] = min((last + kBlockTokens - 1) / kBlockTokens, all.blocks);
  const int64_t tail_first = max(first - tail, int64_t{0});
  const int64_t tail_last = max(min(last, coded) - tail, int64_t{0});
  if (tail_first >= tail_last) return;
  begin[1] = all.blocks + tail_first / kTailSegment;
  end[1] = all.blocks + (tail_last + kTailSegment - 1) / kTailSegment;
}

/// grid: one CTA for 64 atoms and 32 rows of any units; warp w has rows 4 w to 4 w + 3, a lane
/// every 32nd channel.
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(const __grid_constant__ AttentionArgs args) {
  static_assert(sizeof(ProductSmem) <= kPortableSmemBytes);
  ProductSmem& smem = *reinterpret_cast<ProductSmem*>(dynamic_smem());
  const AttentionParams& p = args.p;
  const int rows = kUnitRows, head_dim = static_cast<int>(p.head_dim);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t chunk = blockIdx.x % args.plan.atom_chunks;
  const int64_t first_row = blockIdx.x / args.plan.atom_chunks * kProductRows;
  const int64_t all_rows = args.num_units * rows, first_atom = chunk * kProductAtoms;
  const int atoms = static_cast<int>(min(int64_t{kProductAtoms}, p.v_atoms - first_atom));

  // All threads take the atoms of one unit at a time: its weights are contiguous.
  const int64_t coded = args.plan.segments.coded();
  for (int local = 0; local < kProductRows; local += rows) {
    const int64_t row = first_row + local;
    if (row >= all_rows) {
      for (int i = thread; i < kProductAtoms * rows; i += kProductThreads) {
        smem.weights[i / rows][local + i % rows] = 0.0f;
      }
      continue;
    }
    const Unit unit = make_unit(args, row / rows);
    int64_t begin[2], end[2];
    seen_segments(args, unit, begin, end);
    const float* const weights = args.weights + (unit.idx * coded * p.v_atoms + first_atom) * rows;
    for (int i = thread; i < kProductAtoms * rows; i += kProductThreads) {
      float sum = 0.0f;
      if (i < atoms * rows) {
        for (int run = 0; run < 2; ++run) {
#pragma unroll 4
          for (int64_t s = begin[run]; s < end[run]; ++s) {
            sum += weights[s * p.v_atoms * rows + i];
          }
        }
      }
      smem.weights[i / rows][local + i % rows] = sum;
    }
  }

  constexpr int kOfLane = kMaxHeadDim / kWarpSize;
  float out[kRowsOfWarp][kOfLane] = {};
  for (int first = 0; first < atoms; first += kWarpSize) {
    const int count = min(kWarpSize, atoms - first);
    __syncthreads();
    for (int i = thread; i < count * head_dim; i += kProductThreads) {
      smem.atoms[i / head_dim][i % head_dim] = p.v_dictionary[(first_atom + first) * head_dim + i];
    }
    __syncthreads();
    for (int n = 0; n < count; ++n) {
      const float4 w =
          *reinterpret_cast<const float4*>(&smem.weights[first + n][kRowsOfWarp * warp]);
      const float w4[kRowsOfWarp] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int c = lane + i * kWarpSize;
        if (c >= head_dim) break;
        const float d = smem.atoms[n][c];
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) out[r][i] = __fmaf_rn(w4[r], d, out[r][i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int64_t row = first_row + kRowsOfWarp * warp + r;
    if (row >= all_rows) break;
    float* const result = args.products + (chunk * all_rows + row) * head_dim;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int c = lane + i * kWarpSize;
      if (c < head_dim) result[c] = out[r][i];
    }
  }
}

/// grid: a warp for each row of the wave's units.
__global__ void __launch_bounds__(kFinishRows* kWarpSize, kFinishCtas)
    finish_kernel(const __grid_constant__ AttentionArgs args) {
  const AttentionParams& p = args.p;
  const AttentionPlan& plan = args.plan;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kFinishRows + threadIdx.x / kWarpSize;
  const int64_t all_rows = args.num_units * kUnitRows;
  if (row >= all_rows) return;
  const Unit unit = make_unit(args, row / kUnitRows);
  const int r = static_cast<int>(row % kUnitRows);
  if (r >= unit.num_rows) return;
  if (unit.error != 0 && r == 0 && lane == 0) report_error(args.error_flags, unit.error);

  float top = negative_infinity(), sum = unit.error != 0 ? quiet_nan() : 0.0f;
  if (unit.error == 0) {
    for (int64_t i = lane; i < plan.num_chunks; i += kWarpSize) {
      top = fmaxf(top, args.chunk_max[(unit.idx * plan.num_chunks + i) * kUnitRows + r]);
    }
  }
  top = warp_max(top);
  if (unit.error == 0) {
    for (int64_t s = 0; s < plan.segments.all(); ++s) {
      if (!segment_part(args, unit, s).is_seen(unit)) continue;
      sum += args.sums[(unit.idx * plan.segments.all() + s) * kUnitRows + r];
    }
  }
  // A row without keys is 0 and -inf; a sum of NaN is a score of NaN.
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t at =
      (unit.batch_idx * p.q_heads + unit.q_head(args, r)) * p.q_len + unit.token(args, r);
  for (int64_t c = lane; c < p.head_dim; c += kWarpSize) {
    float out = 0.0f;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < plan.atom_chunks; ++chunk) {
      out += args.products[(chunk * all_rows + row) * p.head_dim + c];
    }
    for (int64_t s = 0; s < plan.segments.buffer; ++s) {
      if (unit.error != 0 || !buffer_part(args, unit, s).is_seen(unit)) continue;
      out += args.values[((unit.idx * plan.segments.buffer + s) * kUnitRows + r) * p.head_dim + c];
    }
    store_element(p.out, at * p.head_dim + c, out * inverse);
  }
  if (lane == 0) {
    const float base = top == negative_infinity() ? 0.0f : top;
    p.lse[at] = sum == 0.0f ? negative_infinity() : base + logf(sum);
  }
}

}  // namespace kvcore::lexico
