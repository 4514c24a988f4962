#include "gdn/cuda/conv1d_launch.cuh"

namespace kvcore::gdn {

template void launch_conv1d<BFloat16>(const ConvArgs&, int64_t);
template void launch_conv1d_backward<BFloat16>(const ConvBackwardArgs&, int64_t);

}  // namespace kvcore::gdn
