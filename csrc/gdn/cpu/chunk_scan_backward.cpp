// gdn_chunk_scan_backward on CPUs: a task takes the value heads of one key head of one sequence,
// one after the other, so that gradients of q and k are summed in a fixed order without waiting.
// With fewer tasks than threads, all threads share each of them.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn::backend {
namespace {

// Value channels of a part of a shared head: as in the forward.
constexpr int64_t kMinColumns = 32;

using Kernel = void(const ChunkScanBackwardParams&, const BackwardTask&, const BackwardWork&,
                    BackwardWorkspace&);

/// A head on one thread.
void run_alone(Kernel* kernel, const ChunkScanBackwardParams& p, const BackwardTask& task,
               BackwardWorkspace& w) {
  kernel(p, task, {.step = BackwardStep::kFirstStates}, w);
  for (int64_t segment = segments_of(task.sequence) - 1; segment >= 0; --segment) {
    kernel(p, task, {.step = BackwardStep::kStates, .segment = segment}, w);
    kernel(p, task, {.step = BackwardStep::kChunks, .segment = segment}, w);
  }
  kernel(p, task, {.step = BackwardStep::kInitialState}, w);
}

/// A head on all threads: states by their columns, then the chunks.
void run_shared(Kernel* kernel, const ChunkScanBackwardParams& p, const BackwardTask& task,
                BackwardWorkspace* workspaces) {
  const int64_t groups = p.sizes.v_dim / kHeadDimMultiple;
  const int64_t parts = std::clamp<int64_t>(p.sizes.v_dim / kMinColumns, 1, num_threads());
  const auto by_columns = [&](const BackwardWork& work) {
    parallel_tasks(parts, [&](int64_t part, int64_t worker) {
      BackwardTask own = task;
      own.v_begin = static_cast<int>(groups * part / parts * kHeadDimMultiple);
      own.v_end = static_cast<int>(groups * (part + 1) / parts * kHeadDimMultiple);
      kernel(p, own, work, workspaces[worker]);
    });
  };
  by_columns({.step = BackwardStep::kFirstStates});
  for (int64_t segment = segments_of(task.sequence) - 1; segment >= 0; --segment) {
    by_columns({.step = BackwardStep::kStates, .segment = segment});
    by_columns({.step = BackwardStep::kDStates, .segment = segment});
    const int64_t left = chunks_of(task.sequence) - segment * kSegmentChunks;
    parallel_tasks(std::min(left, kSegmentChunks), [&](int64_t chunk, int64_t worker) {
      kernel(p, task, {.step = BackwardStep::kChunk, .segment = segment, .chunk = chunk},
             workspaces[worker]);
    });
  }
  by_columns({.step = BackwardStep::kInitialState});
}

/// Where a sequence's chunks begin among those of all: at least as far from the next sequence's as
/// it has chunks.
int64_t first_chunk(const Sequence& sequence, const Sizes& sizes) {
  const int64_t token = sequence.batch_idx * sizes.num_tokens + sequence.begin;
  return token / kChunk + sequence.seq_idx;
}

}  // namespace

void chunk_scan_backward(const ChunkScanBackwardParams& p) {
  const Sizes& s = p.sizes;
  const int64_t group = s.v_heads / s.k_heads;
  const int64_t size = s.k_dim * state_stride(static_cast<int>(s.v_dim));
  const int64_t num_seqs = p.sequences.num_seqs, num_tasks = num_seqs * s.k_heads;
  Sequence longest = {};
  for (int64_t i = 0; i < num_seqs; ++i) {
    const Sequence sequence = sequence_of(p.sequences, s, i);
    if (sequence.length > longest.length) longest = sequence;
  }
  const int64_t segments = std::max<int64_t>(segments_of(longest), 1);
  const int64_t kept = std::clamp<int64_t>(chunks_of(longest), 1, kSegmentChunks);
  const int64_t sums = group > 1 ? 2 * longest.length : 0;

  const bool shared = num_tasks < num_threads();
  const int64_t owners = shared ? 1 : max_workers(num_tasks);  // of states and sums
  const int64_t num_states = segments + 1 + (shared ? 2 : 1) * kept;
  const auto workspaces = make_scratch<BackwardWorkspace>({shared ? num_threads() : owners});
  const auto states = make_scratch<float>({owners, num_states, size});
  const auto dqk = make_scratch<float>({owners, sums, s.k_dim});
  // Sums of one chunk, added up in the order of sequences and chunks.
  const int64_t num_chunks = s.batch * s.num_tokens / kChunk + num_seqs;
  const auto gates = make_scratch<float>({2, s.v_heads, num_chunks});

  auto* const kernel = KVCORE_ISA_SELECT(chunk_scan_backward_kernel);
  const auto task_of = [&](int64_t index, int64_t i, int64_t owner) -> BackwardTask {
    const Sequence sequence = sequence_of(p.sequences, s, index / s.k_heads);
    const int64_t head = index % s.k_heads * group + i;
    float* const own = &states[owner * num_states * size];
    float* const gate = &gates[head * num_chunks + first_chunk(sequence, s)];
    return {.sequence = sequence,
            .head = head,
            .v_begin = 0,
            .v_end = static_cast<int>(s.v_dim),
            .first_of_group = i == 0,
            .last_of_group = i + 1 == group,
            .segments = own,
            .states = own + (segments + 1) * size,
            .d_state = own + segments * size,
            .d_states = shared ? own + (segments + 1 + kept) * size : nullptr,
            .dqk = group > 1 ? &dqk[owner * sums * s.k_dim] : nullptr,
            .dA_log = gate,
            .ddt_bias = gate + s.v_heads * num_chunks};
  };
  if (shared) {
    for (int64_t i = 0; i < num_tasks * group; ++i) {
      run_shared(kernel, p, task_of(i / group, i % group, 0), workspaces.get());
    }
  } else {
    parallel_tasks(num_tasks, [&](int64_t index, int64_t worker) {
      for (int64_t i = 0; i < group; ++i) {
        run_alone(kernel, p, task_of(index, i, worker), workspaces[worker]);
      }
    });
  }
  for (int64_t head = 0; head < s.v_heads; ++head) {
    float dA_log = 0.0f, ddt_bias = 0.0f;
    for (int64_t i = 0; i < num_seqs; ++i) {
      const Sequence sequence = sequence_of(p.sequences, s, i);
      const float* const gate = &gates[head * num_chunks + first_chunk(sequence, s)];
      for (int64_t chunk = 0; chunk < chunks_of(sequence); ++chunk) {
        dA_log += gate[chunk];
        ddt_bias += gate[s.v_heads * num_chunks + chunk];
      }
    }
    if (p.dA_log != nullptr) p.dA_log[head] = dA_log;
    if (p.ddt_bias != nullptr) p.ddt_bias[head] = ddt_bias;
  }
}

}  // namespace kvcore::gdn::backend
