#include "gdn/cuda/chunk_state_launch.cuh"

template void kvcore::gdn::launch_chunk_state<kvcore::gdn::Fp32Operand, 128>(const ScanArgs&);
