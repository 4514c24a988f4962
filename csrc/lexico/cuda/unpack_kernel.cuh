// lexico_unpack: a CTA per tile of a head, a lane per token.
#pragma once

#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

constexpr int kUnpackThreads = 128;

__global__ void __launch_bounds__(kUnpackThreads)
    unpack_kernel(const __grid_constant__ UnpackParams p, int64_t tiles_of_head) {
  const int64_t head = blockIdx.x / tiles_of_head, tile_idx = blockIdx.x % tiles_of_head;
  const int lane = static_cast<int>(threadIdx.x) % kTileTokens;
  const int64_t token = tile_idx * kTileTokens + lane;
  if (token >= p.kv_len) return;
  const Tile tile =
      tile_at(p.tail + (head * p.tiles + tile_idx) * tile_bytes(p.sparsity), p.sparsity);
  const int64_t row = head * p.kv_len + token;
  const int warp = static_cast<int>(threadIdx.x) / kTileTokens;
  if (warp == 0) p.scale[row] = tile.scale[lane];
  for (int j = warp; j < tile.width; j += kUnpackThreads / kTileTokens) {
    p.indices[row * p.sparsity + j] = static_cast<int16_t>(tile.index(j, lane));
    p.coefficients[row * p.sparsity + j] = static_cast<int8_t>(tile.coefficient(j, lane));
  }
}

}  // namespace kvcore::lexico
