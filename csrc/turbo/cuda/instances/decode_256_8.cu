#include "turbo/cuda/decode_launch.cuh"

template void kvcore::turbo::launch_decode<256, 8>(const DecodeArgs&, unsigned);
