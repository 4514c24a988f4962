// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/launch.cuh"
#include "lexico/cuda/attention_launch.h"
#include "lexico/cuda/values_kernel.cuh"

namespace kvcore::lexico {

template <class E>
void launch_values(const AttentionArgs& args, const LaunchBlocks& blocks, bool tail_too) {
  const AttentionPlan& plan = args.plan;
  const int64_t tasks =
      blocks.count * plan.block_parts +
      (tail_too ? plan.segments.tail * plan.tail_parts + plan.segments.buffer : 0);
  if (tasks == 0) return;
  launch(values_kernel<E, kUnitRows>, dim3(grid_of(args.num_units * tasks)), dim3(kValueThreads),
         sizeof(ValuesSmem<E, kUnitRows>), current_stream(), args, blocks);
}

}  // namespace kvcore::lexico
