#include "gdn/cuda/recurrent_step_launch.cuh"

template void kvcore::gdn::launch_recurrent_step<true, 16>(const RecurrentStepParams&);
