// gdn_chunk_scan_backward on CPUs: a task takes the value heads of one key head of one sequence,
// one after the other, so that gradients of q and k are summed in a fixed order without waiting.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn::backend {

void chunk_scan_backward(const ChunkScanBackwardParams& p) {
  const int64_t group = p.sizes.v_heads / p.sizes.k_heads,
                size = p.sizes.k_dim * state_stride(static_cast<int>(p.sizes.v_dim));
  const int64_t num_tasks = p.sequences.num_seqs * p.sizes.k_heads;
  int64_t longest = 0;
  for (int64_t i = 0; i < p.sequences.num_seqs; ++i) {
    longest = std::max(longest, sequence_of(p.sequences, p.sizes, i).length);
  }
  const int64_t chunks = (longest + kChunk - 1) / kChunk;
  const int64_t segments = std::max<int64_t>((chunks + kSegmentChunks - 1) / kSegmentChunks, 1);
  const int64_t kept = std::clamp<int64_t>(chunks, 1, kSegmentChunks);
  const int64_t sums = group > 1 ? 2 * longest : 0;

  const int64_t workers = max_workers(num_tasks);
  const auto workspaces = make_scratch<BackwardWorkspace>({workers});
  const auto states = make_scratch<float>({workers, segments + kept, size});
  const auto dqk = make_scratch<float>({workers, sums, p.sizes.k_dim});
  // Sums of one head and sequence, added up in the order of the sequences.
  const auto gates = make_scratch<float>({2, p.sequences.num_seqs, p.sizes.v_heads});
  const int64_t num_gates = p.sequences.num_seqs * p.sizes.v_heads;
  std::fill_n(gates.get(), 2 * num_gates, 0.0f);

  auto* const kernel = KVCORE_ISA_SELECT(chunk_scan_backward_kernel);
  parallel_tasks(num_tasks, [&](int64_t index, int64_t worker) {
    const Sequence sequence = sequence_of(p.sequences, p.sizes, index / p.sizes.k_heads);
    float* const own_states = &states[worker * (segments + kept) * size];
    for (int64_t i = 0; i < group; ++i) {
      const int64_t head = index % p.sizes.k_heads * group + i;
      float* const gate = &gates[sequence.seq_idx * p.sizes.v_heads + head];
      kernel(p,
             {.sequence = sequence,
              .head = head,
              .first_of_group = i == 0,
              .last_of_group = i + 1 == group,
              .states = own_states + segments * size,
              .segments = own_states,
              .dqk = group > 1 ? &dqk[worker * sums * p.sizes.k_dim] : nullptr,
              .dA_log = gate,
              .ddt_bias = gate + num_gates},
             workspaces[worker]);
    }
  });
  for (int64_t head = 0; head < p.sizes.v_heads; ++head) {
    float dA_log = 0.0f, ddt_bias = 0.0f;
    for (int64_t i = 0; i < p.sequences.num_seqs; ++i) {
      dA_log += gates[i * p.sizes.v_heads + head];
      ddt_bias += gates[num_gates + i * p.sizes.v_heads + head];
    }
    if (p.dA_log != nullptr) p.dA_log[head] = dA_log;
    if (p.ddt_bias != nullptr) p.ddt_bias[head] = ddt_bias;
  }
}

}  // namespace kvcore::gdn::backend
