#include "gdn/cuda/backward_launch.cuh"

template void kvcore::gdn::backward::launch_gradients<1>(const BackwardArgs&);
