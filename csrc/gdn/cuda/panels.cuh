// Tiles of a chunk in shared memory.
//
// A panel is kChunk rows of 128 bytes, a row for each token: 64 channels of bf16, 32 of fp32. The
// 16-byte units of a row are exchanged by the row's number, so that the same unit of eight rows in
// turn lies in different banks: copies, ldmatrix and sums over rows all meet 32 of them.
#pragma once

#include "core/cuda/copy.cuh"
#include "gdn/layout.h"

namespace kvcore::gdn {

constexpr int kRowBytes = 128;
constexpr int kUnitBytes = 16;
constexpr int kRowUnits = kRowBytes / kUnitBytes;
constexpr int kPanelBytes = kChunk * kRowBytes;

__device__ __forceinline__ int panel_offset(int row, int byte) {
  return row * kRowBytes + (byte ^ row % 8 * kUnitBytes);
}

/// A block of up to kChunk rows of a matrix in memory whose units are aligned; beyond are zeros.
template <class T>
struct Block {
  const T* first;
  int64_t stride;
  int rows, columns;
};

/// Starts to copy, with kThreads threads, kUnits units of each row from a column on, to
/// offset_of(row, byte).
template <int kThreads, int kUnits, class T, class F>
__device__ __forceinline__ void copy_units(int thread, uint8_t* to, const Block<T>& block,
                                           int column, const F& offset_of) {
  static_assert(kThreads % kUnits == 0 && kChunk * kUnits % kThreads == 0);
  constexpr int kRowsAtOnce = kThreads / kUnits;
  const int own_byte = thread % kUnits * kUnitBytes;
  const int own_row = thread / kUnits;
  const int own_column = column + own_byte / static_cast<int>(sizeof(T));
#pragma unroll
  for (int first = 0; first < kChunk; first += kRowsAtOnce) {
    const int row = first + own_row;
    const bool valid = row < block.rows && own_column < block.columns;
    cp_async_16(to + offset_of(row, own_byte),
                valid ? block.first + row * block.stride + own_column : block.first, valid);
  }
}

/// Channels [channel, channel + kRowBytes / sizeof(T)) into a panel.
template <int kThreads, class T>
__device__ __forceinline__ void copy_panel(int thread, uint8_t* panel, const Block<T>& tokens,
                                           int channel) {
  copy_units<kThreads, kRowUnits>(thread, panel, tokens, channel,
                                  [](int row, int byte) { return panel_offset(row, byte); });
}

}  // namespace kvcore::gdn
