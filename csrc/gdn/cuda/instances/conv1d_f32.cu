#include "gdn/cuda/conv1d_launch.cuh"

namespace kvcore::gdn {

template void launch_conv1d<float>(const ConvArgs&, int64_t);
template void launch_conv1d_backward<float>(const ConvBackwardArgs&, int64_t);

}  // namespace kvcore::gdn
