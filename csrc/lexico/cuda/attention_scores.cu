#include "core/cuda/launch.cuh"
#include "lexico/cuda/attention_launch.h"
#include "lexico/cuda/scores_kernel.cuh"

namespace kvcore::lexico {

void launch_scores(const AttentionArgs& args, const LaunchBlocks& blocks, bool tail_too) {
  const AttentionPlan& plan = args.plan;
  const int64_t chunks =
      blocks.count * plan.block_chunks + (tail_too ? plan.tail_chunks + plan.segments.buffer : 0);
  if (chunks == 0) return;
  launch(scores_kernel<kUnitRows>, dim3(grid_of(args.num_units * chunks)), dim3(kScoreThreads),
         sizeof(ScoresSmem<kUnitRows>), current_stream(), args, blocks);
}

}  // namespace kvcore::lexico
