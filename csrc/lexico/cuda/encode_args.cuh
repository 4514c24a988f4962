// What the kernels of lexico_encode share: their arguments, the state of the vectors in work, and
// how the search of few vectors is spread over many CTAs.
//
// A chunk of vectors is encoded by one launch that loads them and two for each atom: a search for
// the most correlated atoms, and a step that takes one of them. A vector in work has a slot; lists
// name the slots that are not done, in any order, since no vector's result depends on its place.
#pragma once

#include "core/cuda/device.cuh"
#include "core/types.h"
#include "lexico/cuda/encode_heuristics.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// The dictionary in bf16 lies in units of 16 atoms and 16 channels, the A operands of an mma, 512
// bytes: 16 of each lane, in the order of its registers. One load of a warp is the four matrices of
// an ldmatrix, without its addresses, and meets no bank of shared memory twice.
//
// Which channel is which column of an mma is free. Lane 4 * g + t has, in two units of 32 channels
// together, channels 8 * t to 8 * t + 7 of atoms g and g + 8, the first four in the first unit: of
// a vector, whose rows are read as they are, that is 16 bytes.
constexpr int kUnitAtoms = 16;
constexpr int kUnitChannels = 16;
/// The first of the 8 neighbouring channels, of 32, that a lane has.
__device__ __forceinline__ int lane_channel(int lane) { return lane % 4 * 8; }

/// The two best atoms of a search, best first. A key is the correlation's magnitude, as bits of a
/// float, above the complement of the atom's index: the larger one is better, and the first of
/// equal atoms. 0: none.
struct alignas(16) Candidates {
  uint64_t key[2];
};

__device__ __forceinline__ Candidates merge(const Candidates& a, const Candidates& b) {
  const auto larger = [](uint64_t x, uint64_t y) { return x > y ? x : y; };
  const uint64_t behind = a.key[0] < b.key[0] ? a.key[0] : b.key[0];
  return {larger(a.key[0], b.key[0]), larger(behind, larger(a.key[1], b.key[1]))};
}
__device__ __forceinline__ Candidates merge_with_lane(const Candidates& a, int lane_mask) {
  return merge(a, {__shfl_xor_sync(kAllLanes, a.key[0], lane_mask),
                   __shfl_xor_sync(kAllLanes, a.key[1], lane_mask)});
}
/// The atom of a key, or -1.
__device__ __forceinline__ int atom_of(uint64_t key) {
  return key == 0 ? -1 : static_cast<int>(~static_cast<uint32_t>(key));
}

/// Facts about the vector in a slot.
struct Slot {
  double norm_squared;
  int exponent;  // the vector was multiplied by 2^-exponent
};

struct EncodeArgs {
  EncodeParams p;
  uint4* fragments;        // [num_stages * stage_bytes / 16] the dictionary in bf16, see pack
  float* residuals;        // [capacity, head_dim]
  BFloat16* rounded;       // [capacity, head_dim] residuals as the search reads them
  double* inverse;         // [capacity, inverse_stride(sparsity)], see step
  double* values;          // [capacity, sparsity] coefficients
  Slot* slots;             // [capacity]
  int* lists[2];           // [capacity] slots that are not done, before even and odd steps
  int* counts;             // [sparsity + 1] lengths of the lists before each step
  Candidates* candidates;  // [work items of a search, kSelectRows]
  int64_t num_counts;      // of all chunks
  int64_t first_vector;    // of the chunk; in slot 0
  int64_t num_vectors;     // of the chunk
  int num_stages;
  int resident_ctas;  // of a search
  int select_ctas;    // of a launch of it
};

// Doubles of the inverse factor of a slot: the rows of a triangle, one after the other.
constexpr int triangle(int rows) { return rows * (rows + 1) / 2; }
constexpr int inverse_stride(int sparsity) { return (triangle(sparsity) + 1) / 2 * 2; }

/// How a search is spread: every tile of kSelectRows vectors by every part of the dictionary, an
/// item for each CTA.
struct SearchItems {
  int num_tiles, num_parts;

  __device__ SearchItems(const EncodeArgs& args, int num_active)
      : num_tiles((num_active + kSelectRows - 1) / kSelectRows),
        num_parts(num_tiles == 0 ? 0
                                 : search_parts(num_tiles, args.num_stages, args.resident_ctas)) {}
  __device__ int count() const { return num_tiles * num_parts; }
  __device__ int item(int tile, int part) const { return part * num_tiles + tile; }
  __device__ int tile(int item) const { return item % num_tiles; }
  __device__ int part(int item) const { return item / num_tiles; }
};

/// Appends the slots of the block's warps that are not done to the list before `step`. Every thread
/// calls it; `scratch`: shared memory for kStepWarps + 1 integers.
__device__ inline void keep_slots(const EncodeArgs& args, int step, int slot, bool is_kept,
                                  int* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const bool is_first = threadIdx.x % kWarpSize == 0;
  if (is_first) scratch[warp] = is_kept ? 1 : 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    int kept = 0;
    for (int i = 0; i < kStepWarps; ++i) kept += scratch[i];
    // One addition for the block: those of all blocks meet at one address.
    scratch[kStepWarps] = kept > 0 ? atomicAdd(args.counts + step, kept) : 0;
  }
  __syncthreads();
  if (is_first && is_kept) {
    int at = scratch[kStepWarps];
    for (int i = 0; i < warp; ++i) at += scratch[i];
    args.lists[step % 2][at] = slot;
  }
}

}  // namespace kvcore::lexico
