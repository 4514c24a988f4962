// What the kernels of gdn_chunk_scan get, and what the first leaves for the second.
#pragma once

#include "core/cuda/rows.cuh"
#include "gdn/cuda/gate.cuh"
#include "gdn/cuda/panels.cuh"
#include "gdn/cuda/sequences.cuh"

namespace kvcore::gdn {

// A lower triangular square of fp32 without most of its upper half: columns [0, 32) of all rows,
// then columns [32, 64) of the last 32. Units are those of panels.
constexpr int kTriangleRows = kChunk + kChunk / 2;
constexpr int kTriangleFloats = kTriangleRows * kRowBytes / 4;

/// Which row of a triangle has columns [8 * tile, 8 * tile + 8) of a row of the square.
__device__ __forceinline__ int triangle_row(int row, int tile) {
  return tile < 4 ? row : row + kChunk / 2;
}

/// A chunk of a value head as chunk_solve_kernel leaves it in scratch memory. Tokens past its end
/// have zeros everywhere.
struct alignas(16) ChunkRecord {
  float a[kTriangleFloats];
  float p[kTriangleFloats];
  float read[kChunk];   // -e^G times k's norm: of K S in W
  float out[kChunk];    // scale e^G times q's norm: of Q S
  float write[kChunk];  // e^(G_last - G) times k's norm: of U where it enters the state
  float decay;          // e^G_last, of the state
  float unused[3];
};
static_assert(sizeof(ChunkRecord) % kUnitBytes == 0);

struct ScanArgs {
  ChunkScanParams p;
  InputView q, k, v;  // aligned units, of the operands' type: p's, or copies of them
  DeviceGate gate;
  SequenceTable table;
  int64_t num_slots;
  ChunkRecord* records;  // [num_slots, v_heads]
};

/// A head's tokens of a chunk.
template <class T>
__device__ __forceinline__ Block<T> token_rows(const InputView& x, int64_t batch_idx, int64_t head,
                                               int64_t token, int num_tokens, int num_channels) {
  return {static_cast<const T*>(x.data) + batch_idx * x.batch_stride + head * x.head_stride +
              token * x.token_stride,
          x.token_stride, num_tokens, num_channels};
}

}  // namespace kvcore::gdn
