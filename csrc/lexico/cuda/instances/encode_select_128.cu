#include "lexico/cuda/encode_launch.cuh"

namespace kvcore::lexico {

template void launch_encode_select<128>(const EncodeArgs&, int);

}  // namespace kvcore::lexico
