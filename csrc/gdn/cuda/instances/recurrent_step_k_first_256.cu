#include "gdn/cuda/recurrent_step_launch.cuh"

template void kvcore::gdn::launch_recurrent_step<false, 16>(const RecurrentStepParams&);
