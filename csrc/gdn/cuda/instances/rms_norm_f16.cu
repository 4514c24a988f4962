#include "gdn/cuda/rms_norm_launch.cuh"

namespace kvcore::gdn {

template void launch_rms_norm<Half>(const NormArgs&);
template void launch_rms_norm_backward<Half>(const NormBackwardArgs&);

}  // namespace kvcore::gdn
