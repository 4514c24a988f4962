#include "gdn/cuda/backward_launch.cuh"

template void kvcore::gdn::backward::launch_states<1, 128>(const BackwardArgs&, bool);
