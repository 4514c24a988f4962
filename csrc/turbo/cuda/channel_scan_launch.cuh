// Launch of channel_scan.cuh.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "turbo/cuda/channel_scan.cuh"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo {

/// heads: of all sequences together.
template <class T>
void launch_scan(const ScanArguments& a, int64_t heads) {
  const int64_t ctas = (a.max_blocks + kScanBlocks - 1) / kScanBlocks;
  if (ctas == 0) return;
  launch(channel_scan_kernel<T>, grid_of(heads * ctas), a.head_dim, 0, current_stream(), a);
}

}  // namespace kvcore::turbo
