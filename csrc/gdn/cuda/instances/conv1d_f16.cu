#include "gdn/cuda/conv1d_launch.cuh"

namespace kvcore::gdn {

template void launch_conv1d<Half>(const ConvArgs&, int64_t);
template void launch_conv1d_backward<Half>(const ConvBackwardArgs&, int64_t);

}  // namespace kvcore::gdn
