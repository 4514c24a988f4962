#include "turbo/cuda/append_launch.cuh"

namespace kvcore::turbo {

template void launch_append<BFloat16>(const AppendParams&);

}  // namespace kvcore::turbo
