// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/chunk_scan_launch.h"
#include "gdn/cuda/chunk_state_kernel.cuh"

namespace kvcore::gdn {

template <class Operand, int kMaxDim>
void launch_chunk_state(const ScanArgs& args) {
  launch(chunk_state_kernel<Operand, kMaxDim>,
         head_slice_grid<kSliceColumns>(args.table, args.p.sizes), kStateThreads,
         sizeof(StateSmem<Operand>), current_stream(), args);
}

}  // namespace kvcore::gdn
