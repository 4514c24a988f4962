#include "host/page_allocator.h"

#include <bit>
#include <utility>

#include "turbo/layout.h"

namespace kvcore::host {
namespace {

constexpr int64_t kWordBits = 64;

std::invalid_argument bad_argument(const char* call, const char* argument,
                                   const std::string& expected, const std::string& actual) {
  return std::invalid_argument(std::string("PageAllocator.") + call + ": " + argument +
                               " must be " + expected + ", got " + actual);
}

void check_bits(const char* call, int64_t bits) {
  if (bits != 8 && bits != 4 && bits != 2) {
    throw bad_argument(call, "bits", "one of 8, 4, 2", std::to_string(bits));
  }
}

void check_num_blocks(const char* call, int64_t num_blocks) {
  if (num_blocks < 1 || num_blocks > turbo::kMaxSlabBlocks) {
    throw bad_argument(call, "num_blocks", "in [1, " + std::to_string(turbo::kMaxSlabBlocks) + "]",
                       std::to_string(num_blocks));
  }
}

size_t num_words(int64_t num_blocks) {
  return static_cast<size_t>((num_blocks + kWordBits - 1) / kWordBits);
}

// Bits of the last word that stand for no block.
uint64_t padding_mask(int64_t num_blocks) {
  const int64_t rest = num_blocks % kWordBits;
  return rest == 0 ? 0 : ~uint64_t{0} << rest;
}

}  // namespace

PageAllocator::PageAllocator(std::vector<SlabState> states) {
  for (SlabState& state : states) {
    check_bits("__setstate__", state.bits);
    check_num_blocks("__setstate__", state.num_blocks);
    Slab slab;
    static_cast<SlabState&>(slab) = std::move(state);
    if (slab.used.size() != num_words(slab.num_blocks) ||
        (slab.used.back() & padding_mask(slab.num_blocks)) != 0) {
      throw bad_argument("__setstate__", "used",
                         "one bit for each of " + std::to_string(slab.num_blocks) + " blocks",
                         std::to_string(slab.used.size()) + " words or bits past the last block");
    }
    for (const uint64_t word : slab.used) slab.num_used += std::popcount(word);
    slabs_.push_back(std::move(slab));
  }
}

int64_t PageAllocator::add_slab(int64_t num_blocks, int64_t bits) {
  check_num_blocks("add_slab", num_blocks);
  check_bits("add_slab", bits);
  const std::lock_guard lock(mutex_);
  if (slabs_.size() >= static_cast<size_t>(turbo::kMaxSlabs)) {
    throw OutOfBlocks("PageAllocator.add_slab: all " + std::to_string(turbo::kMaxSlabs) +
                      " slab numbers are in use; add larger slabs");
  }
  Slab slab;
  slab.num_blocks = num_blocks;
  slab.bits = static_cast<int>(bits);
  slab.used.resize(num_words(num_blocks));
  slabs_.push_back(std::move(slab));
  return static_cast<int64_t>(slabs_.size()) - 1;
}

std::vector<int32_t> PageAllocator::allocate(int64_t bits, int64_t count) {
  check_bits("allocate", bits);
  if (count < 0) throw bad_argument("allocate", "count", "at least 0", std::to_string(count));
  const std::lock_guard lock(mutex_);
  const WidthStats stats = stats_locked(bits);
  if (count > stats.num_blocks - stats.num_used) {
    throw OutOfBlocks("PageAllocator.allocate: count must be at most " +
                      std::to_string(stats.num_blocks - stats.num_used) + " (free " +
                      std::to_string(bits) + "-bit blocks), got " + std::to_string(count));
  }
  std::vector<int32_t> entries;
  entries.reserve(static_cast<size_t>(count));
  for (size_t s = 0; s < slabs_.size() && count > 0; ++s) {
    Slab& slab = slabs_[s];
    if (slab.bits != bits) continue;
    for (size_t w = slab.first_free_word; w < slab.used.size() && count > 0; ++w) {
      const uint64_t padding = w + 1 == slab.used.size() ? padding_mask(slab.num_blocks) : 0;
      uint64_t free = ~(slab.used[w] | padding);
      for (; free != 0 && count > 0; free &= free - 1, --count) {
        const int bit = std::countr_zero(free);
        slab.used[w] |= uint64_t{1} << bit;
        ++slab.num_used;
        const int64_t index = static_cast<int64_t>(w) * kWordBits + bit;
        entries.push_back(turbo::block_entry(static_cast<int64_t>(s), index));
      }
      slab.first_free_word = free == 0 ? w + 1 : w;
    }
  }
  return entries;
}

void PageAllocator::free(const std::vector<int64_t>& entries) {
  const std::lock_guard lock(mutex_);
  // Blocks are released in turn and taken back if a later entry is wrong: this finds an entry that
  // is given twice without a second data structure.
  const auto locate = [this](int64_t entry) -> std::pair<Slab*, int64_t> {
    if (entry < 0 || entry > INT32_MAX) return {nullptr, 0};
    const auto slab = static_cast<size_t>(turbo::entry_slab(static_cast<int32_t>(entry)));
    const int64_t index = turbo::entry_index(static_cast<int32_t>(entry));
    if (slab >= slabs_.size() || index >= slabs_[slab].num_blocks) return {nullptr, 0};
    return {&slabs_[slab], index};
  };
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto [slab, index] = locate(entries[i]);
    const uint64_t bit = uint64_t{1} << (index % kWordBits);
    const auto word = static_cast<size_t>(index / kWordBits);
    if (slab != nullptr && (slab->used[word] & bit) != 0) {
      slab->used[word] &= ~bit;
      continue;
    }
    for (size_t k = 0; k < i; ++k) {
      const auto [undo_slab, undo_index] = locate(entries[k]);
      undo_slab->used[static_cast<size_t>(undo_index / kWordBits)] |= uint64_t{1}
                                                                      << (undo_index % kWordBits);
    }
    const std::string expected = slab == nullptr ? "of a block of a slab" : "of a block in use";
    throw bad_argument("free", ("entries[" + std::to_string(i) + "]").c_str(), expected,
                       std::to_string(entries[i]));
  }
  for (const int64_t entry : entries) {
    const auto [slab, index] = locate(entry);
    const auto word = static_cast<size_t>(index / kWordBits);
    --slab->num_used;
    if (word < slab->first_free_word) slab->first_free_word = word;
  }
}

void PageAllocator::keep(std::span<const int32_t> entries) {
  const std::lock_guard lock(mutex_);
  std::vector<std::vector<uint64_t>> kept;
  kept.reserve(slabs_.size());
  for (const Slab& slab : slabs_) kept.emplace_back(slab.used.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const int32_t entry = entries[i];
    const auto s = entry < 0 ? slabs_.size() : static_cast<size_t>(turbo::entry_slab(entry));
    const int64_t index = turbo::entry_index(entry);
    const auto word = static_cast<size_t>(index / kWordBits);
    const uint64_t bit = uint64_t{1} << (index % kWordBits);
    if (s >= slabs_.size() || index >= slabs_[s].num_blocks || (slabs_[s].used[word] & bit) == 0) {
      throw bad_argument("keep", ("entries[" + std::to_string(i) + "]").c_str(),
                         "of a block in use", std::to_string(entry));
    }
    kept[s][word] |= bit;
  }
  for (size_t s = 0; s < slabs_.size(); ++s) {
    slabs_[s].used = std::move(kept[s]);
    slabs_[s].num_used = 0;
    slabs_[s].first_free_word = 0;
    for (const uint64_t word : slabs_[s].used) slabs_[s].num_used += std::popcount(word);
  }
}

WidthStats PageAllocator::stats(int64_t bits) const {
  check_bits("stats", bits);
  const std::lock_guard lock(mutex_);
  return stats_locked(bits);
}

WidthStats PageAllocator::stats_locked(int64_t bits) const {
  WidthStats stats;
  for (const Slab& slab : slabs_) {
    if (slab.bits != bits) continue;
    ++stats.num_slabs;
    stats.num_blocks += slab.num_blocks;
    stats.num_used += slab.num_used;
  }
  return stats;
}

std::vector<SlabState> PageAllocator::state() const {
  const std::lock_guard lock(mutex_);
  return {slabs_.begin(), slabs_.end()};
}

}  // namespace kvcore::host
