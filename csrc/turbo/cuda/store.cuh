// Where things lie in a store, for kernels, and the checks of what device tensors say about it.
#pragma once

#include <limits>
#include <string>

#include "core/cuda/device.cuh"
#include "core/cuda/grid.h"
#include "core/dispatch.h"
#include "turbo/params.h"

namespace kvcore::turbo {

// Slabs travel as a kernel argument: nothing is copied to the device first, and a captured graph
// keeps them. A static cache has a few, a growing one up to kMaxSlabs; each launch pays for the
// bytes of its table, so there are two sizes.
constexpr int kFewSlabs = 16;

/// A store as kernels take it, by value.
template <int kSlabs>
struct DeviceStore {
  const int32_t* block_table;  // [batch, 2, kv_heads, max_pages]
  int64_t max_pages;
  uint8_t* tail;      // [batch, 2, kv_heads, kTailSlots, block_bytes(8, head_dim)]
  int32_t* seq_lens;  // [batch]
  int kv_heads, head_dim;
  int num_slabs;
  uint32_t slab_rows[kSlabs];  // num_blocks << 4 | bits
  uint8_t* slab_data[kSlabs];

  static constexpr int kBitsOfWidth = 4;
};

/// Throws if a block of the store could not be read in units of 16 bytes.
template <int kSlabs>
DeviceStore<kSlabs> device_store(const Store& s) {
  check_aligned_16(s.tail, "tail");
  DeviceStore<kSlabs> store{.block_table = s.block_table,
                            .max_pages = s.max_pages,
                            .tail = s.tail,
                            .seq_lens = s.seq_lens,
                            .kv_heads = static_cast<int>(s.kv_heads),
                            .head_dim = static_cast<int>(s.head_dim),
                            .num_slabs = static_cast<int>(s.num_slabs),
                            .slab_rows = {},
                            .slab_data = {}};
  for (int i = 0; i < store.num_slabs; ++i) {
    const Slab& slab = s.slabs[i];
    check_aligned_16(slab.data, "pool[" + std::to_string(i) + "]");
    store.slab_data[i] = slab.data;
    store.slab_rows[i] = static_cast<uint32_t>(slab.num_blocks) << store.kBitsOfWidth |
                         static_cast<uint32_t>(slab.bits);
  }
  return store;
}

/// Calls f(std::integral_constant<int, kSlabs>{}) with the smallest table that takes num_slabs.
template <class F>
void dispatch_slabs(int64_t num_slabs, F&& f) {
  if (num_slabs <= kFewSlabs) {
    f(std::integral_constant<int, kFewSlabs>{});
  } else {
    f(std::integral_constant<int, kMaxSlabs>{});
  }
}

/// One of a sequence's heads of K (kv = 0) or V (kv = 1), and its row in every
/// [batch, 2, kv_heads, ...] array.
struct Lane {
  int64_t batch_idx;
  int kv;
  int head_idx;
  int64_t row;
};

/// The lane with that row.
__device__ inline Lane lane_of_row(int64_t row, int kv_heads) {
  return {row / (2 * kv_heads), static_cast<int>(row / kv_heads % 2),
          static_cast<int>(row % kv_heads), row};
}

/// CTAs of a sequence where each has a lane: one if there are no heads, for the length alone.
__host__ __device__ inline int64_t ctas_of_sequence(int64_t kv_heads) {
  return kv_heads == 0 ? 1 : 2 * kv_heads;
}
/// The lane of this CTA there; without heads only batch_idx means something.
__device__ inline Lane lane_of_cta(int kv_heads) {
  return kv_heads == 0 ? Lane{blockIdx.x, 0, 0, 0} : lane_of_row(blockIdx.x, kv_heads);
}

struct PoolBlock {
  uint8_t* data;  // null if the entry names no block of the pool
  int bits;
};

/// The block of a full page; page_idx is below max_pages.
template <int kSlabs>
__device__ inline PoolBlock pool_block(const DeviceStore<kSlabs>& s, int64_t lane_row,
                                       int64_t page_idx) {
  const int32_t entry = s.block_table[lane_row * s.max_pages + page_idx];
  if (entry < 0 || entry_slab(entry) >= s.num_slabs) return {nullptr, 0};
  const uint32_t rows = s.slab_rows[entry_slab(entry)];
  const int bits = static_cast<int>(rows & ((1u << s.kBitsOfWidth) - 1));
  if (entry_index(entry) >= (rows >> s.kBitsOfWidth)) return {nullptr, 0};
  return {s.slab_data[entry_slab(entry)] + entry_index(entry) * block_bytes(bits, s.head_dim),
          bits};
}

/// The tail slot that page_idx has or would have.
template <int kSlabs>
__device__ inline uint8_t* tail_block(const DeviceStore<kSlabs>& s, int64_t lane_row,
                                      int64_t page_idx) {
  return s.tail + (lane_row * kTailSlots + tail_slot(page_idx)) * block_bytes(8, s.head_dim);
}

/// Tokens that fit a sequence: the open tail needs no entry in the block table.
template <int kSlabs>
__device__ inline int64_t max_seq_len(const DeviceStore<kSlabs>& s) {
  // Dividing first keeps a huge max_pages (of an empty table) from overflowing.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  return s.max_pages >= kLimit / kPageTokens ? kLimit : (s.max_pages + 1) * kPageTokens - 1;
}

/// Whether the entries of pages [page_begin, page_end) of a sequence, of all its heads, name blocks
/// of the pool. Every thread of the CTA looks at some: each gets the verdict on its own.
template <int kSlabs>
__device__ inline bool check_entries(const DeviceStore<kSlabs>& s, int64_t batch_idx,
                                     int64_t page_begin, int64_t page_end) {
  bool exist = true;
  const int64_t pages = page_end - page_begin, lanes = 2 * s.kv_heads;
  for (int64_t i = threadIdx.x; i < lanes * pages; i += blockDim.x) {
    const int64_t row = batch_idx * lanes + i / pages;
    exist = exist && pool_block(s, row, page_begin + i % pages).data != nullptr;
  }
  return exist;
}

}  // namespace kvcore::turbo
