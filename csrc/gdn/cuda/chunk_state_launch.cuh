// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/chunk_scan_launch.h"
#include "gdn/cuda/chunk_state_kernel.cuh"

namespace kvcore::gdn {

template <class Operand, int kMaxDim>
void launch_chunk_state(const ScanArgs& args) {
  const Sizes& s = args.p.sizes;
  const int64_t num_slices = (s.v_dim + kSliceColumns - 1) / kSliceColumns;
  launch(chunk_state_kernel<Operand, kMaxDim>,
         grid_of(byte_count({args.table.sequences.num_seqs, s.v_heads, num_slices})), kStateThreads,
         sizeof(StateSmem<Operand>), current_stream(), args);
}

}  // namespace kvcore::gdn
