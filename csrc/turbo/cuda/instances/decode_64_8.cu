#include "turbo/cuda/decode_launch.cuh"

template void kvcore::turbo::launch_decode<64, 8>(const DecodeArgs&, unsigned);
