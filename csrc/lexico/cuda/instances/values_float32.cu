#include "lexico/cuda/values_launch.cuh"

template void kvcore::lexico::launch_values<float>(const AttentionArgs&, const LaunchBlocks&, bool);
