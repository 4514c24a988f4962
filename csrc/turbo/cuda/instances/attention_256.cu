#include "turbo/cuda/attention_launch.cuh"

template void kvcore::turbo::launch_attention<256>(const AttentionArgs&);
