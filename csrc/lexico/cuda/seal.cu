// lexico_seal on CUDA. How long the blocks are depends on codes, so the host waits for their sizes:
// once in 4096 tokens, between the replays of whatever graphs decoding runs in.
#include "lexico/cuda/seal_kernel.cuh"

#include <algorithm>
#include <vector>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"

namespace kvcore::lexico::backend {

SealSizes seal_sizes(const SealParams& p) {
  check_aligned_16(p.k_tail, "lexico_seal: k_tail");
  check_aligned_16(p.v_tail, "lexico_seal: v_tail");
  SealSizes result = {.k_bytes = 0, .v_bytes = 0, .bad_index = -1};
  const int64_t heads = p.batch * p.kv_heads;
  if (heads == 0) return result;
  const int64_t bytes = byte_count({heads, sizeof(HeadSizes)});
  const Scratch scratch(bytes);
  auto* const sizes = reinterpret_cast<HeadSizes*>(scratch.data());
  launch(seal_sizes_kernel, grid_of(heads), kSealThreads, kSealWarps * sizeof(int),
         current_stream(), p, sizes);
  std::vector<HeadSizes> values(heads);
  read_back(values.data(), sizes, bytes, current_stream(), "lexico_seal");
  for (const HeadSizes& head : values) {
    result.k_bytes = std::max(result.k_bytes, align_block(head.k_bytes));
    result.v_bytes = std::max(result.v_bytes, v_block_bytes(p.v_atoms, head.v_pairs));
    result.bad_index = std::max<int64_t>(result.bad_index, head.bad_index);
  }
  return result;
}

void seal(const SealParams& p) {
  const int64_t heads = p.batch * p.kv_heads;
  if (heads == 0) return;
  const int ranges = static_cast<int>(ceil_div(p.v_atoms, kSealAtoms));
  const cudaStream_t stream = current_stream();
  launch(seal_k_kernel, grid_of(heads), kSealThreads, sizeof(KBlockTiles), stream, p);
  launch(seal_v_kernel, grid_of(heads * ranges), kSealThreads, SealVSmem::bytes(p.v_sparsity),
         stream, p, ranges, error_flags());
}

}  // namespace kvcore::lexico::backend
