// Byte layout of the TurboAttention store: the single home of its constants.
//
// A *block* holds one page (64 tokens) of K or of V for one kv head at one bit width:
//
//   8 bit:      [header 64][codes 64 * head_dim]
//   4, 2 bit:   [header 64][step  head_dim (uint8)][zero  head_dim (int8)][codes]
//
// Every part starts on a 64-byte boundary (head_dim is a multiple of 32), so that a cache line or
// a bulk copy never straddles two parts. An int8 code is q8 in [-119, 119]; a 4- or 2-bit code q
// stands for q8' = q * step[c] + zero[c]; a value is q8 * header.scale.
//
// Codes are interleaved by four along the contracted dimension (channels for K, tokens for V),
// the operand order of byte dot products: vpdpbusd on CPUs, the B fragment of mma.m16n8k32 on
// GPUs. Narrow codes share a byte with those 16 further along the contracted dimension, which are
// the second register of that fragment, so one masked load yields whole operands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvcore::turbo {

constexpr int kPageTokens = 64;  // tokens of a page share a scale (Bc and n_b of the paper)
constexpr int kCodeMax = 119;    // largest stage-1 code; 2 * 119 * 119 fits vpmaddubsw's int16 sum
constexpr int kInterleave = 4;   // codes of one dword
constexpr int kChunk = 32;       // contracted elements of one mma.m16n8k32 step
constexpr int kMaxHeadDim = 256;

// At 2 bit stage 2 also tries a step that does not reach across a channel's range, in eighths of
// the one that does: what it clips is little beside what it gains on all the other codes.
constexpr bool tries_short_step(int bits) { return bits == 2; }
constexpr int kShortStepEighths = 7;

struct BlockHeader {
  float scale;       // stage-1 scale; NaN when the page holds a non-finite value
  int32_t page_idx;  // in a tail slot: the page whose codes it holds, -1 for none; 0 in the pool
  uint8_t zeros[56];
};
constexpr int kHeaderBytes = 64;
static_assert(sizeof(BlockHeader) == kHeaderBytes);

/// Bytes of the codes of a block.
constexpr int64_t code_bytes(int bits, int64_t head_dim) {
  return kPageTokens * head_dim * bits / 8;
}

/// Offset of the codes inside a block.
constexpr int64_t code_offset(int bits, int64_t head_dim) {
  return kHeaderBytes + (bits == 8 ? 0 : 2 * head_dim);
}

/// Bytes of a block: the row size by which a pool slab tells its width.
constexpr int64_t block_bytes(int bits, int64_t head_dim) {
  return code_offset(bits, head_dim) + code_bytes(bits, head_dim);
}

/// Where a code lies: byte offset inside the codes, and how far to shift that byte right.
struct CodePosition {
  int64_t byte;
  int shift;
};

/// K codes: [channel group of 4][token][4 channels].
constexpr CodePosition k_code_position(int bits, int64_t token, int64_t channel) {
  const int64_t group = channel / kInterleave, lane = channel % kInterleave;
  if (bits == 8) return {(group * kPageTokens + token) * kInterleave + lane, 0};
  // Groups g and g + 4 of a 32-channel chunk share a byte; at 2 bit tokens t and t + 32 do too.
  const int64_t row = channel / kChunk * 4 + group % 4;
  const int second = static_cast<int>(group % 8 / 4);
  if (bits == 4) return {(row * kPageTokens + token) * kInterleave + lane, 4 * second};
  const int late = static_cast<int>(token / kChunk);
  return {(row * kChunk + token % kChunk) * kInterleave + lane, 2 * (second + 2 * late)};
}

/// V codes: [token group of 4][channel][4 tokens].
constexpr CodePosition v_code_position(int bits, int64_t token, int64_t channel, int64_t head_dim) {
  const int64_t group = token / kInterleave, lane = token % kInterleave;
  if (bits == 8) return {(group * head_dim + channel) * kInterleave + lane, 0};
  // Groups g and g + 4 of a 32-token chunk share a byte; at 2 bit both chunks of the page do.
  const int second = static_cast<int>(group % 8 / 4);
  const int chunk = static_cast<int>(token / kChunk);
  const int64_t row = bits == 4 ? chunk * 4 + group % 4 : group % 4;
  const int shift = bits == 4 ? 4 * second : 2 * (second + 2 * chunk);
  return {(row * head_dim + channel) * kInterleave + lane, shift};
}

// Block table entries: slab number and row in the slab. Negative: no block.
constexpr int kSlabIndexBits = 21;
constexpr int kMaxSlabs = 1 << 10;
constexpr int64_t kMaxSlabBlocks = int64_t{1} << kSlabIndexBits;

constexpr int32_t block_entry(int64_t slab, int64_t index) {
  return static_cast<int32_t>((slab << kSlabIndexBits) | index);
}
constexpr int64_t entry_slab(int32_t entry) { return entry >> kSlabIndexBits; }
constexpr int64_t entry_index(int32_t entry) { return entry & (kMaxSlabBlocks - 1); }

// The tail: two 8-bit blocks per (sequence, K|V, head). Page p lives in slot p % 2, so the last
// flushed page keeps its int8 codes beside the open one until the page after next is opened.
constexpr int kTailSlots = 2;
constexpr int tail_slot(int64_t page_idx) { return static_cast<int>(page_idx % kTailSlots); }

}  // namespace kvcore::turbo
