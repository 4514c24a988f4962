// Which blocks of a store's slabs are in use. Host memory only: it hands out numbers, the tensors
// belong to the cache.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvcore::host {

// Not enough free blocks, or no slab number left.
struct OutOfBlocks : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct SlabState {
  int64_t num_blocks;          // 1 to kMaxSlabBlocks
  int bits;                    // 8, 4 or 2
  std::vector<uint64_t> used;  // bit i % 64 of word i / 64: block i is handed out
};

// Totals over the slabs of one width.
struct WidthStats {
  int64_t num_slabs = 0;
  int64_t num_blocks = 0;
  int64_t num_used = 0;
};

// Entries are those of the block table: turbo/layout.h, block_entry(slab, index). A call either
// does all it was asked or throws and changes nothing. Calls from several threads are serialized.
class PageAllocator {
 public:
  PageAllocator() = default;
  // Restores what state() returned.
  explicit PageAllocator(std::vector<SlabState> slabs);

  // Number of the new slab: 0, 1, 2, ... Throws std::invalid_argument, or OutOfBlocks past
  // kMaxSlabs.
  int64_t add_slab(int64_t num_blocks, int64_t bits);

  // The count lowest free entries of that width, ascending. Throws OutOfBlocks if there are fewer.
  std::vector<int32_t> allocate(int64_t bits, int64_t count);

  // Throws std::invalid_argument at the first entry that names no block, or a block not in use (an
  // entry given twice included).
  void free(const std::vector<int64_t>& entries);

  // Frees every block that is not among the entries, which may repeat: a block table says which
  // blocks are in use, however many rows share one. Throws std::invalid_argument at the first
  // entry that names no block or a block not in use.
  void keep(std::span<const int32_t> entries);

  WidthStats stats(int64_t bits) const;
  std::vector<SlabState> state() const;

 private:
  struct Slab : SlabState {
    int64_t num_used = 0;
    size_t first_free_word = 0;  // every word before it is full
  };

  WidthStats stats_locked(int64_t bits) const;

  mutable std::mutex mutex_;
  std::vector<Slab> slabs_;
};

}  // namespace kvcore::host
