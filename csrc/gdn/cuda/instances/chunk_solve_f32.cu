#include "gdn/cuda/chunk_solve_launch.cuh"

template void kvcore::gdn::launch_chunk_solve<kvcore::gdn::Fp32Operand>(const ScanArgs&);
