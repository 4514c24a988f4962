// What the prefill kernels get: where each sequence's tiles and pages are, and how quantized pages
// lie in scratch memory between the two kernels.
#pragma once

#include "core/cuda/device.cuh"
#include "turbo/cuda/fragments.cuh"
#include "turbo/cuda/heuristics.h"
#include "turbo/params.h"

namespace kvcore::turbo {

// A quantized page of K and V in scratch memory: B fragments in the order in which lanes load them,
// so that a copy to shared memory is linear and a load of 16 bytes takes a warp through 512 bytes.
//   [K: chunk of channels][chunk of tokens j][i / 2][lane][i % 2][half of the chunk of channels]
//   [V: channel block][chunk of tokens j][i / 2][lane][i % 2][half of the chunk of tokens]
//   [scale of K, scale of V, 8 unused bytes]
// i and lane as in fragments.cuh; the last two indices count dwords of four codes, those of a pair
// being the two registers of a fragment.
constexpr int kFragmentPairBytes = kWarpSize * 16;
constexpr int kBlockFragmentBytes = 2 * kChunksOfPage * kFragmentPairBytes;  // 32 x 64 codes
constexpr int prefill_scales_offset(int head_dim) { return 2 * kPageTokens * head_dim; }
constexpr int prefill_page_bytes(int head_dim) { return prefill_scales_offset(head_dim) + 16; }

/// Offset of the dword of K with channels [4 * (channel / 4), + 4) of a token.
constexpr int k_fragment_offset(int token, int channel) {
  const int group = channel % kChunk / kInterleave, i = token % 4;
  const int lane = 4 * (token % kChunk / 4 % 4 * 2 + token % kChunk / 16) + group % 4;
  return (channel / kChunk * kChunksOfPage + token / kChunk) * 2 * kFragmentPairBytes +
         i / 2 * kFragmentPairBytes + lane * 16 + i % 2 * 8 + group / 4 * 4;
}
/// Offset of the dword of V with tokens [4 * (token / 4), + 4) of a channel.
constexpr int v_fragment_offset(int token, int channel, int head_dim) {
  const int group = token % kChunk / kInterleave, i = channel % 4;
  const int lane = 4 * (channel % kChunk / 4) + group % 4;
  return kPageTokens * head_dim +
         (channel / kChunk * kChunksOfPage + token / kChunk) * 2 * kFragmentPairBytes +
         i / 2 * kFragmentPairBytes + lane * 16 + i % 2 * 8 + group / 4 * 4;
}

struct AttentionArgs {
  AttentionParams p;
  int64_t group;  // q_heads / kv_heads
  // Slots of tiles of query rows and of pages, over all sequences. Packed sequences begin where the
  // tokens before them would end at the earliest, plus their number: then no two share a slot, some
  // slots stay empty, and nothing but the tensors' shapes decides how many there are.
  int64_t num_tiles;      // of a kv head
  int64_t num_pages;      // of a kv head
  int64_t first_page;     // without cu_seqlens: that some row sees; earlier ones have no slot
  int64_t pages_per_seq;  // without cu_seqlens
  int64_t tiles_per_seq;  // without cu_seqlens
  uint8_t* pages;         // [kv_heads, num_pages, prefill_page_bytes]
  int32_t* is_valid;      // whether cu_seqlens are; null without them
  float threshold;        // sas_threshold * log2(e); -inf for exact exponentials
  uint32_t* error_flags;
};

/// One sequence: a batch entry, or a run of packed tokens.
struct Sequence {
  int64_t batch_idx;
  int64_t q_begin, q_len;
  int64_t kv_begin, kv_len;
  int64_t first_page_slot;  // of the page at first_page
  int64_t first_page;       // before it nothing is read
  int64_t unit;             // the tile or page of the sequence that a slot stands for
};

/// The sequence whose tile (kOfTiles) or page has a slot, for cu_seqlens that are valid.
template <bool kOfTiles>
__device__ inline Sequence sequence_of_slot(const AttentionArgs& args, int64_t tile_rows,
                                            int64_t slot) {
  const AttentionParams& p = args.p;
  Sequence s = {};
  if (p.cu_seqlens_q == nullptr) {
    const int64_t per_seq = kOfTiles ? args.tiles_per_seq : args.pages_per_seq;
    s.batch_idx = slot / per_seq;
    s.q_len = p.q_len;
    s.kv_len = p.kv_len;
    s.first_page = args.first_page;
    s.first_page_slot = s.batch_idx * args.pages_per_seq;
    s.unit = slot % per_seq + (kOfTiles ? 0 : args.first_page);
    return s;
  }
  const auto first_slot = [&](int64_t seq) {
    return kOfTiles ? p.cu_seqlens_q[seq] * args.group / tile_rows + seq
                    : int64_t{p.cu_seqlens_k[seq]} / kPageTokens + seq;
  };
  // The last sequence that begins at the slot or before it.
  int64_t low = 0, high = p.num_seqs;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_slot(middle) <= slot ? low : high) = middle;
  }
  s.q_begin = p.cu_seqlens_q[low];
  s.q_len = p.cu_seqlens_q[low + 1] - s.q_begin;
  s.kv_begin = p.cu_seqlens_k[low];
  s.kv_len = p.cu_seqlens_k[low + 1] - s.kv_begin;
  s.first_page_slot = s.kv_begin / kPageTokens + low;
  s.unit = slot - first_slot(low);
  return s;
}

}  // namespace kvcore::turbo
