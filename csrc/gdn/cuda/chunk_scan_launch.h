// Launchers of the scan's kernels, instantiated in instances/.
#pragma once

namespace kvcore::gdn {

struct ScanArgs;

template <class Operand>
void launch_chunk_solve(const ScanArgs& args);
template <class Operand, int kMaxDim>
void launch_chunk_state(const ScanArgs& args);

}  // namespace kvcore::gdn
