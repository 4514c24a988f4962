#include "turbo/cuda/append_launch.cuh"

namespace kvcore::turbo {

template void launch_append<Half>(const AppendParams&);

}  // namespace kvcore::turbo
