// Slots of a pool of states that sequences name, and what is checked of them on the device.
#pragma once

#include "core/cuda/device.cuh"

namespace kvcore::gdn {

struct SlotTable {
  const int32_t* indices;  // [batch, num_columns], negative: none; null: sequence b has slot b
  int64_t batch, num_columns, num_slots;

  __device__ int64_t slot(int64_t batch_idx, int64_t column) const {
    return indices == nullptr ? batch_idx : indices[batch_idx * num_columns + column];
  }
  __device__ bool has(int64_t slot) const { return slot >= -1 && slot < num_slots; }
};

/// This thread's share of the question whether the entries in columns [begin, end) of a sequence
/// are in range and named by no other entry: two CTAs that wrote one slot would race. The table is
/// read by all CTAs of a multiprocessor, so that few of them go further than its first-level cache;
/// 4 bytes for each entry compare with the 32 KiB that a CTA moves of a state.
__device__ inline bool check_slots(const SlotTable& table, int64_t batch_idx, int64_t begin,
                                   int64_t end) {
  if (table.indices == nullptr) return true;
  bool good = true;
  for (int64_t column = begin; column < end; ++column) {
    good = good && table.has(table.slot(batch_idx, column));
  }
  const int64_t own = batch_idx * table.num_columns, count = table.batch * table.num_columns;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int32_t slot = table.indices[i];
    for (int64_t column = begin; column < end && slot >= 0; ++column) {
      good = good && (slot != table.indices[own + column] || i == own + column);
    }
  }
  return good;
}

}  // namespace kvcore::gdn
