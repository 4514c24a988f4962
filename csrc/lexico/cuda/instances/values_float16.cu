#include "lexico/cuda/values_launch.cuh"

template void kvcore::lexico::launch_values<kvcore::Half>(const AttentionArgs&, const LaunchBlocks&,
                                                          bool);
