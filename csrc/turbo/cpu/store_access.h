// Where things lie in a store. For code that is compiled per ISA level.
#pragma once

#include <cstddef>

#include "turbo/params.h"

namespace kvcore::turbo::KVCORE_ISA {

/// Row of (sequence, K|V, head) in every [batch, 2, kv_heads, ...] array.
inline int64_t lane_index(const Store& s, int64_t batch_idx, int kv, int64_t head_idx) {
  return (batch_idx * 2 + kv) * s.kv_heads + head_idx;
}

struct PoolBlock {
  uint8_t* data;
  int bits;
};

/// The block of a full page; its entry has been checked.
inline PoolBlock pool_block(const Store& s, int64_t batch_idx, int kv, int64_t head_idx,
                            int64_t page_idx) {
  const int64_t row = lane_index(s, batch_idx, kv, head_idx) * s.max_pages;
  const int32_t entry = s.block_table[row + page_idx];
  const Slab& slab = s.slabs[entry_slab(entry)];
  return {slab.data + entry_index(entry) * block_bytes(slab.bits, s.head_dim), slab.bits};
}

/// The tail slot that page_idx has or would have.
inline uint8_t* tail_block(const Store& s, int64_t batch_idx, int kv, int64_t head_idx,
                           int64_t page_idx) {
  const int64_t slot = lane_index(s, batch_idx, kv, head_idx) * kTailSlots + tail_slot(page_idx);
  return s.tail + slot * block_bytes(8, s.head_dim);
}

}  // namespace kvcore::turbo::KVCORE_ISA
