#include "turbo/cuda/channel_scan_launch.cuh"

namespace kvcore::turbo {

template void launch_scan<BFloat16>(const ScanArguments&, int64_t);

}  // namespace kvcore::turbo
