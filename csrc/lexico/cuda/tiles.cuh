// Tiles as pointers into their bytes, for kernels.
#pragma once

#include "core/cuda/device.cuh"
#include "lexico/params.h"

namespace kvcore::lexico {

struct Tile {
  int width;
  const uint16_t* scale;       // [kTileTokens] fp16
  const int16_t* indices;      // [width, kTileTokens]
  const int8_t* coefficients;  // [width, kTileTokens]

  /// Of pair j of a token; negative indices count as large ones.
  __device__ __forceinline__ int index(int j, int lane) const {
    return static_cast<uint16_t>(indices[j * kTileTokens + lane]);
  }
  __device__ __forceinline__ int coefficient(int j, int lane) const {
    return coefficients[j * kTileTokens + lane];
  }
};
__device__ __forceinline__ Tile tile_at(const uint8_t* data, int64_t width) {
  return {static_cast<int>(width), reinterpret_cast<const uint16_t*>(data),
          reinterpret_cast<const int16_t*>(data + kTileIndices),
          reinterpret_cast<const int8_t*>(data + tile_coefficients(width))};
}

struct MutableTile {
  uint16_t* scale;
  int16_t* indices;
  int8_t* coefficients;

  __device__ __forceinline__ void set(int j, int lane, int index, int coefficient) const {
    indices[j * kTileTokens + lane] = static_cast<int16_t>(index);
    coefficients[j * kTileTokens + lane] = static_cast<int8_t>(coefficient);
  }
};
__device__ __forceinline__ MutableTile mutable_tile_at(uint8_t* data, int64_t width) {
  return {reinterpret_cast<uint16_t*>(data), reinterpret_cast<int16_t*>(data + kTileIndices),
          reinterpret_cast<int8_t*>(data + tile_coefficients(width))};
}

}  // namespace kvcore::lexico
