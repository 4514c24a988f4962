#include "gdn/cuda/chunk_solve_launch.cuh"

template void kvcore::gdn::launch_chunk_solve<kvcore::gdn::Bf16Operand>(const ScanArgs&);
