#include "gdn/cuda/rms_norm_launch.cuh"

namespace kvcore::gdn {

template void launch_rms_norm<BFloat16>(const NormArgs&);
template void launch_rms_norm_backward<BFloat16>(const NormBackwardArgs&);

}  // namespace kvcore::gdn
