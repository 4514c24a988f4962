// Finding, in the launch that reads a length, a CTA that may write it: one that knows that all CTAs
// of its group have read it.
#pragma once

#include <atomic>
#include <chrono>

#include "core/cuda/device.cuh"

namespace kvcore::turbo {

/// A word for each CTA of each group, in memory of any content: a CTA has arrived if its word is
/// the key, so nothing has to clear them before the launch. Whoever sees that all have arrived
/// clears them, so that a captured graph can run with the same key again. Other data is taken for
/// an arrival with a probability of 2^-64.
struct Arrivals {
  unsigned long long* words;  // [groups, members]
  unsigned long long key;
};

/// A key that no earlier launch had and that ordinary data does not contain.
inline unsigned long long arrivals_key() {
  static std::atomic<uint64_t> state{
      static_cast<uint64_t>(std::chrono::high_resolution_clock::now().time_since_epoch().count())};
  // The output function of SplitMix64.
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15) + 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

/// Called by one whole warp of each CTA, after a barrier behind everything that the CTA reads of
/// what the result allows to be written. True for at least one CTA of the group, once all have
/// called it: for the last one, and for any other that comes close to it.
__device__ inline bool all_arrived(const Arrivals& arrivals, int64_t group, int64_t members,
                                   int64_t member) {
  unsigned long long* words = arrivals.words + group * members;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) {
    __threadfence();
    atomicExch(words + member, arrivals.key);
    // Of two CTAs at least one sees the word of the other.
    __threadfence();
  }
  __syncwarp();
  bool all = true;
  for (int64_t i = lane; i < members; i += kWarpSize) {
    all = all && atomicAdd(words + i, 0ull) == arrivals.key;
  }
  // What follows in any lane comes after what the CTAs of all words had read.
  __threadfence();
  __syncwarp();
  all = __all_sync(kAllLanes, all);
  if (all) {
    for (int64_t i = lane; i < members; i += kWarpSize) atomicExch(words + i, 0ull);
  }
  return all;
}

}  // namespace kvcore::turbo
