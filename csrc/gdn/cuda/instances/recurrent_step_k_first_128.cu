#include "gdn/cuda/recurrent_step_launch.cuh"

template void kvcore::gdn::launch_recurrent_step<false, 8>(const RecurrentStepParams&);
