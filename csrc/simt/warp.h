// Barriers and warp collectives.
#pragma once

#include <cstring>
#include <source_location>
#include <type_traits>

#include "simt/scheduler.h"

namespace kvcore::simt {

/// What a lane brings to a shuffle and takes from it.
template <class T>
struct Shuffle {
  T value;
  int source;  // lane whose value it wants
  T result;
};

// Not instrumented: it touches the stacks of waiting threads, which are theirs while they run.
template <class T>
__attribute__((no_sanitize("address", "thread", "undefined"))) void finish_shuffle(
    void* const (&brought)[kWarp], unsigned lanes) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    auto* own = static_cast<Shuffle<T>*>(brought[i]);
    // The value of a lane that takes no part is undefined.
    const auto* other = static_cast<const Shuffle<T>*>(brought[own->source]);
    if (other != nullptr) {
      own->result = other->value;
    } else {
      __builtin_memset(&own->result, 0xff, sizeof(T));
    }
  }
}

template <class T>
inline T shuffle(const Collective& collective, unsigned mask, T value, int source,
                 const std::source_location& where) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle<T> own{value, source, value};
  meet(collective, mask, &own, where);
  return own.result;
}

// First lane of the group of `width` lanes that a lane belongs to.
inline int group_begin(int width) { return static_cast<int>(lane()) & ~(width - 1); }

template <class T>
inline constexpr Collective kShuffle{"__shfl_sync", &finish_shuffle<T>, false, false};
template <class T>
inline constexpr Collective kShuffleXor{"__shfl_xor_sync", &finish_shuffle<T>, false, false};
template <class T>
inline constexpr Collective kShuffleUp{"__shfl_up_sync", &finish_shuffle<T>, false, false};
template <class T>
inline constexpr Collective kShuffleDown{"__shfl_down_sync", &finish_shuffle<T>, false, false};

struct Vote {
  unsigned predicate;
  unsigned ballot;   // lanes whose predicate is not zero
  unsigned present;  // lanes that voted
};
void finish_vote(void* const (&brought)[kWarp], unsigned lanes);
inline constexpr Collective kVote{"a vote", &finish_vote, false, false};
inline constexpr Collective kSyncWarp{"__syncwarp", nullptr, false, true};

inline Vote vote(unsigned mask, int predicate, const std::source_location& where) {
  Vote own{predicate != 0, 0, 0};
  meet(kVote, mask, &own, where);
  return own;
}

}  // namespace kvcore::simt

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  kvcore::simt::block_barrier(where);
}

inline void __syncwarp(unsigned mask = kvcore::simt::kFullMask,
                       std::source_location where = std::source_location::current()) {
  kvcore::simt::meet(kvcore::simt::kSyncWarp, mask, nullptr, where);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     std::source_location where = std::source_location::current()) {
  const int begin = kvcore::simt::group_begin(width);
  return kvcore::simt::shuffle(kvcore::simt::kShuffle<T>, mask, value,
                               begin | (source & (width - 1)), where);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(kvcore::simt::lane());
  const int source = lane ^ lane_mask;
  // Later groups are out of reach, earlier ones are not.
  const bool in_reach = source < kvcore::simt::group_begin(width) + width;
  return kvcore::simt::shuffle(kvcore::simt::kShuffleXor<T>, mask, value, in_reach ? source : lane,
                               where);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(kvcore::simt::lane());
  const int source = lane - static_cast<int>(delta);
  return kvcore::simt::shuffle(kvcore::simt::kShuffleUp<T>, mask, value,
                               source >= kvcore::simt::group_begin(width) ? source : lane, where);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(kvcore::simt::lane());
  const int source = lane + static_cast<int>(delta);
  const bool in_reach = source < kvcore::simt::group_begin(width) + width;
  return kvcore::simt::shuffle(kvcore::simt::kShuffleDown<T>, mask, value, in_reach ? source : lane,
                               where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return kvcore::simt::vote(mask, predicate, where).ballot;
}

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return kvcore::simt::vote(mask, predicate, where).ballot != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  const kvcore::simt::Vote result = kvcore::simt::vote(mask, predicate, where);
  return result.ballot == result.present;
}

inline int __syncthreads_or(int predicate,
                            std::source_location where = std::source_location::current()) {
  return kvcore::simt::block_barrier_or(predicate != 0, where);
}

// Threads run one after the other, so every write is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}
