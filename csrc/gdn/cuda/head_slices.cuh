// Grids over (sequence, value head, slice of a head's value channels), slices fastest: those of the
// kernels that go from chunk to chunk. Value channels do not meet in a state.
#pragma once

#include "core/cuda/grid.h"
#include "gdn/cuda/sequences.cuh"

namespace kvcore::gdn {

struct HeadSlice {
  int64_t seq, head, k_head;
  int64_t column;  // its first value channel
};

template <int kColumns>
unsigned head_slice_grid(const SequenceTable& table, const Sizes& s) {
  return grid_of(byte_count({table.sequences.num_seqs, s.v_heads, ceil_div(s.v_dim, kColumns)}));
}
/// Of this CTA.
template <int kColumns>
__device__ inline HeadSlice head_slice(const Sizes& s) {
  const int64_t num_slices = (s.v_dim + kColumns - 1) / kColumns;
  const int64_t head = blockIdx.x / num_slices % s.v_heads;
  return {.seq = blockIdx.x / num_slices / s.v_heads,
          .head = head,
          .k_head = head / (s.v_heads / s.k_heads),
          .column = blockIdx.x % num_slices * kColumns};
}

}  // namespace kvcore::gdn
