#include "gdn/cuda/backward_launch.cuh"

template void kvcore::gdn::backward::launch_gradients<2>(const BackwardArgs&);
