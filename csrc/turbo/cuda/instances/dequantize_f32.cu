#include "turbo/cuda/dequantize_launch.cuh"

namespace kvcore::turbo {

template void launch_dequantize<float>(const DequantizeParams&);

}  // namespace kvcore::turbo
