// The pass over V: what each segment adds to the weights of V's atoms, or, of the buffer, to the
// output itself; and the segment's sum of exponentials. Maxima of all scores are known, so nothing
// has to be scaled when segments are put together.
//
// grid: one CTA for each (part of the atoms of a block or of the tail, segment of the buffer;
// unit), units fastest. Which atoms a CTA has changes no sum: every atom's is computed by itself.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/online_softmax.cuh"
#include "lexico/cuda/block_values.cuh"
#include "lexico/cuda/buffer_values.cuh"
#include "lexico/cuda/tail_values.cuh"

namespace kvcore::lexico {

template <class E, int kRows>
struct ValuesSmem {
  union {
    BlockValuesSmem<E, kRows> block;
    TailValuesSmem<kRows> tail;
    BufferValuesSmem<kRows> buffer;
  };
  ValueRows<kRows> rows;
};

template <class E, int kRows>
__global__ void __launch_bounds__(kValueThreads, kValueCtas)
    values_kernel(const __grid_constant__ AttentionArgs args,
                  const __grid_constant__ LaunchBlocks blocks) {
  using Smem = ValuesSmem<E, kRows>;
  static_assert(sizeof(Smem) <= kPortableSmemBytes);
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const AttentionPlan& plan = args.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const Unit unit = make_unit(args, blockIdx.x % args.num_units);
  if (unit.error != 0) return;

  int64_t num = blockIdx.x / args.num_units, segment, part_idx;
  const int64_t of_blocks = blocks.count * plan.block_parts;
  const int64_t of_tail = plan.segments.tail * plan.tail_parts;
  if (num < of_blocks) {
    segment = blocks.first + num / plan.block_parts;
    part_idx = num % plan.block_parts;
  } else if (num < of_blocks + of_tail) {
    segment = plan.segments.blocks + (num - of_blocks) / plan.tail_parts;
    part_idx = (num - of_blocks) % plan.tail_parts;
  } else {
    segment = plan.segments.coded() + num - of_blocks - of_tail;
    part_idx = 0;
  }
  const Part part = segment_part(args, unit, segment);
  if (!part.is_seen(unit)) return;

  // The maximum of each row: a thread looks at chunks of one row only.
  const float* const maxima = args.chunk_max + unit.idx * plan.num_chunks * kRows;
  float top = negative_infinity();
  for (int64_t i = thread; i < plan.num_chunks * kRows; i += kValueThreads) {
    top = fmaxf(top, maxima[i]);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance >= kRows; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  }
  if (thread % kWarpSize < kRows) {
    smem.rows.scratch[thread / kWarpSize][thread % kWarpSize] = top;
  }
  __syncthreads();
  if (thread < kRows) {
    for (int w = 0; w < kValueWarps; ++w) top = fmaxf(top, smem.rows.scratch[w][thread]);
    // A row without a finite score keeps -inf, and -inf - -inf would make NaN of its zeros.
    smem.rows.base[thread] = top == negative_infinity() ? 0.0f : top;
    smem.rows.keys.set(args, unit, part, thread);
    smem.rows.poison[thread] = 0;
  }
  __syncthreads();

  const float* const scores = args.scores + (unit.idx * plan.num_slots + part.first_slot) * kRows;
  const ValueInput<kRows> in = {
      .args = args,
      .unit = unit,
      .part = part,
      .scores = scores,
      // The first part of a segment writes its sums.
      .sums =
          part_idx == 0 ? args.sums + (unit.idx * plan.segments.all() + segment) * kRows : nullptr,
      .rows = smem.rows};
  float* const weights =
      args.weights + (unit.idx * plan.segments.coded() + segment) * args.p.v_atoms * kRows;
  if (segment < plan.segments.blocks) {
    const int first = static_cast<int>(part_idx * plan.block_part_atoms);
    add_block(in, blocks.block[segment - blocks.first], first,
              static_cast<int>(min(first + plan.block_part_atoms, args.p.v_atoms)), smem.block,
              weights);
  } else if (segment < plan.segments.coded()) {
    const int first = static_cast<int>(part_idx * plan.tail_part_atoms);
    add_tail(in, (segment - plan.segments.blocks) * (kTailSegment / kTileTokens), first,
             static_cast<int>(min(first + plan.tail_part_atoms, args.p.v_atoms)), smem.tail,
             weights);
  } else {
    const int64_t num_buffer = segment - plan.segments.coded();
    add_buffer(
        in, num_buffer * kBufferSegment, smem.buffer,
        args.values + (unit.idx * plan.segments.buffer + num_buffer) * kRows * args.p.head_dim);
  }
}

}  // namespace kvcore::lexico
