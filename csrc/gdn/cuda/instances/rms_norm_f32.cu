#include "gdn/cuda/rms_norm_launch.cuh"

namespace kvcore::gdn {

template void launch_rms_norm<float>(const NormArgs&);
template void launch_rms_norm_backward<float>(const NormBackwardArgs&);

}  // namespace kvcore::gdn
