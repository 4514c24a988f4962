#include "gdn/cuda/backward_launch.cuh"

template void kvcore::gdn::backward::launch_states<2, 256>(const BackwardArgs&, bool);
