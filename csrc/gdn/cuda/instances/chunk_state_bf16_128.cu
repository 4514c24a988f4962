#include "gdn/cuda/chunk_state_launch.cuh"

template void kvcore::gdn::launch_chunk_state<kvcore::gdn::Bf16Operand, 128>(const ScanArgs&);
