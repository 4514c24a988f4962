#include "turbo/cuda/dequantize_launch.cuh"

namespace kvcore::turbo {

template void launch_dequantize<BFloat16>(const DequantizeParams&);

}  // namespace kvcore::turbo
