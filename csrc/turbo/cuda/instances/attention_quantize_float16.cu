#include "turbo/cuda/attention_quantize_launch.cuh"

template void kvcore::turbo::launch_attention_quantize<kvcore::Half>(const AttentionArgs&);
