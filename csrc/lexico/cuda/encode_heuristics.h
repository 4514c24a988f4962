// How the kernels of lexico_encode are launched, and why. Nothing here was measured on a GPU: the
// figures are counts of bytes, instructions and CTAs (README, "CUDA"). Everything depends on shapes
// and on the device alone, and nothing of it changes a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lexico/params.h"

namespace kvcore::lexico {

// ---- Search

constexpr int kSelectWarps = 8;
// Vectors of a warp: four tiles of the 8 columns of an mma, which all use each 16 bytes of the
// dictionary that a lane loads from shared memory. Their residuals stay in registers, 64 of a
// lane's at head_dim 128 and 128 at 256: eight tiles would not.
constexpr int kWarpRows = 32;
// Vectors of a CTA. All of them use each byte of the dictionary that comes from L2: at 4096 atoms
// of head_dim 128 a CTA reads 1 MiB a step, 44,000 cycles of an H200's L2 bandwidth shared by all
// of its multiprocessors, and multiplies for 105,000 cycles at 60 % of the tensor cores' peak.
constexpr int kSelectRows = kSelectWarps * kWarpRows;

// Atoms of a stage, 8 to 16 KiB of bf16: a warp has 64 to 128 mma between two barriers. It is also
// what a search of few vectors is split by: 4096 atoms make 64 parts, each a latency of L2 and some
// 1,000 cycles of multiplying, short beside a launch.
constexpr int stage_atoms(int head_dim) { return head_dim <= 128 ? 64 : 32; }
constexpr int stage_bytes(int head_dim) { return stage_atoms(head_dim) * head_dim * 2; }
// Stages in shared memory: one is read while three arrive. 32 to 64 KiB.
constexpr int kSelectStages = 4;

// CTAs of a multiprocessor: two where the registers leave room, so that one multiplies while the
// other one waits at a barrier or finishes.
constexpr int ctas_per_multiprocessor(int head_dim) { return head_dim <= 64 ? 2 : 1; }

// Times that the CTAs of a search fill the multiprocessors, at most.
constexpr int kMaxWaves = 4;
// What a CTA takes to begin and to end, in stages: a trip to L2 for its vectors and its first
// stage, and merging.
constexpr int kStartStages = 2;

/// Into how many parts the dictionary is split for so many tiles of vectors, at most resident_ctas:
/// where that leaves multiprocessors idle in the only wave, several waves of smaller parts take
/// less time. 94 tiles on 132 multiprocessors: 3 waves of 16 stages, not one of 64.
constexpr int search_parts(int num_tiles, int num_stages, int resident_ctas) {
  int best = 1, least = num_stages + kStartStages;
  for (int waves = 1; waves <= kMaxWaves; ++waves) {
    const int fitting = waves * resident_ctas / num_tiles;
    const int parts = fitting < num_stages ? fitting : num_stages;
    const int cost = waves * ((num_stages + parts - 1) / parts + kStartStages);
    if (cost < least) {
      best = parts;
      least = cost;
    }
  }
  return best;
}
static_assert(search_parts(132, 64, 132) == 1 && search_parts(94, 64, 132) == 4);
static_assert(search_parts(1, 64, 132) == 64 && search_parts(47, 64, 132) == 5);

// ---- Steps

// Warps of a CTA of the other kernels; each takes one vector. Their shared memory is largest at
// sparsity 64: 74 KB.
constexpr int kStepWarps = 4;

// CTAs of a step that the registers must leave room for on a multiprocessor. Told nothing, ptxas
// keeps the smaller kernel to 56 registers for sm_120 and spills; at 80 it does not.
constexpr int step_ctas(int quads) { return quads == 1 ? 6 : 1; }

// Scratch memory of all vectors in work at most. Two thirds of it are used at head_dim 128 and
// sparsity 32, where every multiprocessor of an H200 has its 256 vectors; at sparsity 64 it serves
// half as many, and each tile's search is split in two.
constexpr int64_t kMaxStateBytes = int64_t{256} << 20;

struct EncodePlan {
  int64_t num_vectors;
  int64_t capacity;       // vectors in work at a time, a multiple of kSelectRows
  int64_t num_chunks;     // num_vectors / capacity, rounded up
  int64_t num_stages;     // of the dictionary
  int64_t resident_ctas;  // of the search, at a time
  int64_t select_ctas;    // of a launch of the search
};

inline EncodePlan encode_plan(const EncodeParams& p, int sm_count, int64_t state_bytes) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t num_vectors = p.batch * p.heads * p.tokens;
  const int64_t num_stages = ceil_div(p.atoms, stage_atoms(head_dim));
  const int64_t ctas = int64_t{sm_count} * ctas_per_multiprocessor(head_dim);
  // A tile for each CTA, unless that is too much memory or more than there are.
  const int64_t fitting = std::max<int64_t>(kMaxStateBytes / state_bytes / kSelectRows, 1);
  const int64_t tiles = std::min({ctas, fitting, ceil_div(num_vectors, kSelectRows)});
  return {.num_vectors = num_vectors,
          .capacity = tiles * kSelectRows,
          .num_chunks = ceil_div(num_vectors, tiles * kSelectRows),
          .num_stages = num_stages,
          .resident_ctas = ctas,
          .select_ctas = std::min(kMaxWaves * ctas, tiles * num_stages)};
}

}  // namespace kvcore::lexico
