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

/// Rows of a head's tokens in memory whose units are aligned.
template <class T>
struct TokenRows {
  const T* first;  // of the chunk
  int64_t stride;
  int num_tokens;    // further rows are zero
  int num_channels;  // likewise
};

/// Starts to copy, with kThreads threads, channels [channel, channel + kRowBytes / sizeof(T)) into
/// a panel.
template <int kThreads, class T>
__device__ __forceinline__ void copy_panel(int thread, uint8_t* panel, const TokenRows<T>& rows,
                                           int channel) {
  static_assert(kThreads % kRowUnits == 0 && kChunk * kRowUnits % kThreads == 0);
  constexpr int kRowsAtOnce = kThreads / kRowUnits;
  const int unit = thread % kRowUnits;
  const int own_row = thread / kRowUnits;
  const int own_channel = channel + unit * kUnitBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int first = 0; first < kChunk; first += kRowsAtOnce) {
    const int row = first + own_row;
    const bool valid = row < rows.num_tokens && own_channel < rows.num_channels;
    cp_async_16(panel + panel_offset(row, unit * kUnitBytes),
                valid ? rows.first + row * rows.stride + own_channel : rows.first, valid);
  }
}

}  // namespace kvcore::gdn
