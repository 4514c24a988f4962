// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/chunk_scan_launch.h"
#include "gdn/cuda/chunk_solve_kernel.cuh"

namespace kvcore::gdn {

template <class Operand>
void launch_chunk_solve(const ScanArgs& args) {
  launch(chunk_solve_kernel<Operand>, grid_of(byte_count({args.num_slots, args.p.sizes.k_heads})),
         kSolveThreads, sizeof(SolveSmem), current_stream(), args);
}

}  // namespace kvcore::gdn
