// The search of lexico_encode: for every vector that is not done, the two atoms whose products with
// its residual are largest in bf16. One of them is the most correlated atom of fp32 nearly always
// (README), and the step after it computes both exactly.
//
//              part 0        part 1       ...      a work item: a tile of 256 vectors by a part
//   tile 0   [warp 0: 32 vectors]                  of the dictionary; a CTA of 8 warps takes
//            [warp 1: 32        ]                  one. Residuals are B operands, in registers;
//            ...                                   stages of the dictionary pass through shared
//   tile 1                                         memory.
//
// Sums are those of an mma's own order over 16 channels, then over groups of 16 channels: the
// candidates of a vector depend neither on its row, nor on the other rows, nor on the parts.
#pragma once

#include "core/cuda/mma.cuh"
#include "lexico/cuda/encode_args.cuh"

namespace kvcore::lexico {

constexpr int kSelectThreads = kSelectWarps * kWarpSize;
constexpr int select_smem_bytes(int head_dim) { return kSelectStages * stage_bytes(head_dim); }

// Of each 16 atoms a lane sees two, those of its mma rows; over a window of stages they are
// numbered in their order. While a window is searched the numbers take the place of the lowest bits
// of a product, one part in 2^18 of it: far less than what bf16 leaves of it.
constexpr int kWindowNumbers = 32;
constexpr uint32_t kNumberMask = kWindowNumbers - 1;
constexpr int stage_numbers(int head_dim) { return stage_atoms(head_dim) / 8; }
// Vectors whose products a lane has: two columns of each of a warp's tiles of 8.
constexpr int kLaneVectors = kWarpRows / 8 * 2;

/// The two largest of a lane's products in a window: magnitudes, the complements of their numbers
/// in the low bits, so that the first of equal ones is the larger.
struct WindowBest {
  uint32_t key[2];

  __device__ __forceinline__ void add(float product, uint32_t number_complement) {
    const uint32_t x =
        (__float_as_uint(product) & (0x7fffffffu & ~kNumberMask)) | number_complement;
    const uint32_t behind = min(key[0], x);
    key[0] = max(key[0], x);
    key[1] = max(key[1], behind);
  }
};

/// The two best atoms of a vector so far, of those that one lane sees.
struct LaneBest {
  uint32_t magnitude[2];
  int atom[2];

  /// Products of later atoms than those before: equal ones change nothing.
  __device__ __forceinline__ void add(const WindowBest& window, int first_atom) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t x = window.key[i] & ~kNumberMask;
      const int x_atom = first_atom + static_cast<int>(~window.key[i] & kNumberMask) * 8;
      const bool is_first = x > magnitude[0], is_second = x > magnitude[1];
      magnitude[1] = is_first ? magnitude[0] : is_second ? x : magnitude[1];
      atom[1] = is_first ? atom[0] : is_second ? x_atom : atom[1];
      magnitude[0] = is_first ? x : magnitude[0];
      atom[0] = is_first ? x_atom : atom[0];
    }
  }
  __device__ __forceinline__ uint64_t key(int i) const {
    const uint64_t complement = static_cast<uint32_t>(~atom[i]);
    return magnitude[i] == 0 ? 0 : uint64_t{magnitude[i]} << 32 | complement;
  }
};

template <int kHeadDim>
__device__ inline void start_stage(const EncodeArgs& args, int stage, uint4* smem) {
  constexpr int kSize = stage_bytes(kHeadDim) / static_cast<int>(sizeof(uint4));
  static_assert(kSize % kSelectThreads == 0);
  const uint4* from = args.fragments + int64_t{stage} * kSize + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kSize; i += kSelectThreads) cp_async_16(smem + i + threadIdx.x, from + i);
}

/// B operands of a warp's 32 vectors: of each tile of 8 and each 16 channels those of one mma. A
/// lane's loads of 16 bytes are the operands of two mma as they are.
template <int kHeadDim>
struct ResidualFragments {
  uint32_t b[kWarpRows / 8][kHeadDim / 16][2];

  __device__ __forceinline__ void load(const EncodeArgs& args, const int* list, int first_row,
                                       int num_rows, int lane) {
#pragma unroll
    for (int tile = 0; tile < kWarpRows / 8; ++tile) {
      const int row = first_row + 8 * tile + lane / 4;
      const int slot = row < num_rows ? list[row] : -1;
      const BFloat16* from = args.rounded + int64_t{slot} * kHeadDim + lane_channel(lane);
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        const uint4 words = slot >= 0 ? load_streaming_16(from + 32 * i) : uint4{0, 0, 0, 0};
        b[tile][2 * i][0] = words.x;
        b[tile][2 * i][1] = words.y;
        b[tile][2 * i + 1][0] = words.z;
        b[tile][2 * i + 1][1] = words.w;
      }
    }
  }
};

/// Searches the atoms of a stage; their numbers in the window begin at `first_number`.
template <int kHeadDim>
__device__ __forceinline__ void search_stage(const ResidualFragments<kHeadDim>& residuals,
                                             const uint4* stage, int lane, uint32_t first_number,
                                             WindowBest (&best)[kLaneVectors]) {
  constexpr int kUnits = kHeadDim / kUnitChannels;
#pragma unroll 1
  for (int group = 0; group < stage_atoms(kHeadDim) / kUnitAtoms; ++group) {
    float sums[kWarpRows / 8][4] = {};
    const uint4* from = stage + group * kUnits * kWarpSize + lane;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const uint4 words = load_16(from + unit * kWarpSize);
      const uint32_t a[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int tile = 0; tile < kWarpRows / 8; ++tile) {
        mma_m16n8k16_bf16(sums[tile], a, residuals.b[tile][unit]);
      }
    }
    const uint32_t complement = kNumberMask - first_number - 2 * static_cast<uint32_t>(group);
#pragma unroll
    for (int tile = 0; tile < kWarpRows / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        best[2 * tile + i % 2].add(sums[tile][i], complement - static_cast<uint32_t>(i / 2));
      }
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kSelectThreads, ctas_per_multiprocessor(kHeadDim))
    encode_select_kernel(const __grid_constant__ EncodeArgs args, int step) {
  static_assert(select_smem_bytes(kHeadDim) <= kPortableSmemBytes);
  constexpr int kSize = stage_bytes(kHeadDim) / static_cast<int>(sizeof(uint4));
  uint4* const smem = reinterpret_cast<uint4*>(dynamic_smem());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_active = args.counts[step];
  const SearchItems items(args, num_active);
  const int item = static_cast<int>(blockIdx.x);
  if (item >= items.count()) return;
  const int first_row = items.tile(item) * kSelectRows + warp * kWarpRows;
  const int part = items.part(item);
  const int begin = static_cast<int>(int64_t{part} * args.num_stages / items.num_parts);
  const int end = static_cast<int>(int64_t{part + 1} * args.num_stages / items.num_parts);
#pragma unroll
  for (int i = 0; i < kSelectStages - 1; ++i) {
    if (begin + i < end) start_stage<kHeadDim>(args, begin + i, smem + i * kSize);
    cp_async_commit();
  }
  ResidualFragments<kHeadDim> residuals;
  residuals.load(args, args.lists[step % 2], first_row, num_active, lane);
  LaneBest best[kLaneVectors] = {};
  WindowBest window[kLaneVectors] = {};
  int first_number = 0, first_atom = begin * stage_atoms(kHeadDim) + lane / 4;

  for (int stage = begin; stage < end; ++stage) {
    cp_async_wait<kSelectStages - 2>();
    __syncthreads();
    // Into the place of the stage before, which everyone has left.
    const int next = stage + kSelectStages - 1;
    if (next < end) {
      start_stage<kHeadDim>(args, next, smem + (next - begin) % kSelectStages * kSize);
    }
    cp_async_commit();
    if (first_row >= num_active) continue;
    search_stage(residuals, smem + (stage - begin) % kSelectStages * kSize, lane,
                 static_cast<uint32_t>(first_number), window);
    first_number += stage_numbers(kHeadDim);
    if (first_number < kWindowNumbers && stage + 1 < end) continue;
#pragma unroll
    for (int i = 0; i < kLaneVectors; ++i) {
      best[i].add(window[i], first_atom);
      window[i] = {{0, 0}};
    }
    first_atom += first_number * 8;
    first_number = 0;
  }
#pragma unroll
  for (int i = 0; i < kLaneVectors; ++i) {
    Candidates found{{best[i].key(0), best[i].key(1)}};
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) {
      found = merge_with_lane(found, distance);
    }
    const int row = first_row + i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (lane / 4 == i && row < num_active) {
      args.candidates[int64_t{item} * kSelectRows + row % kSelectRows] = found;
    }
  }
}

}  // namespace kvcore::lexico
