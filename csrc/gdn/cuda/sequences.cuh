// Where the sequences of a call and their chunks are, for kernels: nothing is read on the host.
#pragma once

#include "core/cuda/cu_seqlens.cuh"
#include "core/cuda/error_flags.cuh"
#include "gdn/params.h"

namespace kvcore::gdn {

// Chunks have slots, over all sequences. Packed sequences begin where the chunks of the tokens
// before them would end at the earliest, plus their number: then no two share a slot, some slots
// stay empty, and nothing but the tensors' shapes decides how many there are.
struct SequenceTable {
  Sequences sequences;
  int64_t num_tokens;       // of a batch entry
  int64_t chunks_per_seq;   // without cu_seqlens
  const int32_t* is_valid;  // whether cu_seqlens are; null without them

  __device__ __forceinline__ bool valid() const { return is_valid == nullptr || *is_valid != 0; }
};

inline SequenceTable sequence_table(const Sequences& sequences, int64_t num_tokens) {
  return {.sequences = sequences,
          .num_tokens = num_tokens,
          .chunks_per_seq = (num_tokens + kChunk - 1) / kChunk,
          .is_valid = nullptr};
}
inline int64_t num_chunk_slots(const SequenceTable& table) {
  return table.sequences.cu_seqlens == nullptr
             ? table.sequences.num_seqs * table.chunks_per_seq
             : table.num_tokens / kChunk + table.sequences.num_seqs;
}

/// One sequence: a batch entry, or a run of packed tokens.
struct Sequence {
  int64_t batch_idx;
  int64_t begin;  // its first token
  int64_t length;
  int64_t first_slot;

  __device__ __forceinline__ int64_t num_chunks() const { return (length + kChunk - 1) / kChunk; }
};
__device__ inline Sequence sequence_at(const SequenceTable& table, int64_t seq) {
  const int32_t* cu_seqlens = table.sequences.cu_seqlens;
  if (cu_seqlens == nullptr) return {seq, 0, table.num_tokens, seq * table.chunks_per_seq};
  const int64_t begin = cu_seqlens[seq];
  return {0, begin, cu_seqlens[seq + 1] - begin, begin / kChunk + seq};
}

/// The last of `count` that `holds`, which is true of the first and of none behind one of which it
/// is not.
template <class F>
__device__ inline int64_t last_that(int64_t count, const F& holds) {
  int64_t last = 0;
  while (count - last > 1) {
    const int64_t middle = (last + count) / 2;
    (holds(middle) ? last : count) = middle;
  }
  return last;
}

struct Chunk {
  int64_t batch_idx;
  int64_t begin;   // its first token
  int num_tokens;  // not positive: the slot is empty
};
__device__ inline Chunk chunk_of_slot(const SequenceTable& table, int64_t slot) {
  const int32_t* cu_seqlens = table.sequences.cu_seqlens;
  const int64_t seq = cu_seqlens == nullptr ? slot / table.chunks_per_seq
                                            : last_that(table.sequences.num_seqs, [&](int64_t i) {
                                                return cu_seqlens[i] / kChunk + i <= slot;
                                              });
  const Sequence s = sequence_at(table, seq);
  const int64_t done = (slot - s.first_slot) * kChunk;
  return {s.batch_idx, s.begin + done, static_cast<int>(min(int64_t{kChunk}, s.length - done))};
}

/// Whether cu_seqlens rise from 0 to the number of tokens. One CTA, before all others.
template <int kThreads>
__global__ void check_sequences_kernel(Sequences sequences, int64_t num_tokens, int32_t* is_valid,
                                       uint32_t* error_flags) {
  const bool good = rises_to<kThreads>(sequences.cu_seqlens, sequences.num_seqs, num_tokens);
  const bool all_good = __syncthreads_or(!good) == 0;
  if (threadIdx.x == 0) {
    *is_valid = all_good;
    if (!all_good) report_error(error_flags, kErrorCuSeqlens);
  }
}

}  // namespace kvcore::gdn
