#include "turbo/cuda/append_launch.cuh"

namespace kvcore::turbo {

template void launch_append<float>(const AppendParams&);

}  // namespace kvcore::turbo
