// What the CPU attention ops share: a tile of query rows with its running softmax, and one page.
//
// A row is one query token of one query head. The rows of a kv head are numbered token-major:
// row = token * group + head % group, so that the query heads that share K and V share a tile.
#pragma once

#include "core/cpu/isa.h"
#include "turbo/params.h"

namespace kvcore::turbo {

// Rows of a tile. K and V of a page (16 KiB at head_dim 128) are read once per tile, so a tile
// should be large; its accumulator (48 KiB) should stay in L2. A multiple of the rows that the
// kernels hold in registers: 8 with AVX-512, 4 and 2 below.
constexpr int kTileRows = 96;
constexpr int kMaxLanes = 16;

// Up to so many rows narrow pages are read as they are, and decode splits the context. With more, a
// page is rebuilt as 8 bit once per tile, and the tiles themselves are the parallel work.
constexpr int kFewRows = 16;

/// State of up to kTileRows rows. Arrays over channels are packed: row r begins at r * head_dim.
struct alignas(64) RowTile {
  int8_t q8[kTileRows * kMaxHeadDim];  // codes of q * balance
  float o[kTileRows * kMaxHeadDim];    // sum of exp(S - m) * V
  float l[kTileRows * kMaxLanes];      // partial sums of exp(S - m), one per vector lane
  float m[kTileRows + kMaxLanes];      // running maximum, -inf before the first key; read past it
  float q_scale[kTileRows];            // s_Q * softmax scale; 0 for a query that is not finite
  float q_mean[kTileRows];             // scale * sum_c q[c] * mean[c], the term of lse
  int32_t q_excess[kTileRows];         // what dot_ss adds to S8 too much, negated
  int64_t first_key[kTileRows];        // the row sees keys [first_key, end_key)
  int64_t end_key[kTileRows];
  alignas(64) uint8_t widened[2][block_bytes(8, kMaxHeadDim)];  // narrow K and V as 8-bit blocks
  bool poisoned[kTileRows];  // the row attends something that is not finite: NaN
  int num_rows;
  int head_dim;
};

/// Which rows a tile holds and what they attend.
struct TileSource {
  InputView q;        // [batch, q_heads, q_len, head_dim]
  int64_t batch_idx;  // of q
  int64_t kv_head;
  int64_t group;          // q_heads / kv_heads
  int64_t first_token;    // of q: where the sequence begins (packed sequences)
  int64_t q_len, kv_len;  // of this sequence
  int64_t first_row;      // in [0, q_len * group)
  int num_rows;           // <= kTileRows
  int head_dim;
  const float* k_balance;  // [head_dim] of the kv head, may be null
  const float* k_mean;     // [head_dim], may be null
};

/// One page of K and V of a kv head.
struct Page {
  const uint8_t* k;  // block of k_bits
  const uint8_t* v;  // block of v_bits
  int k_bits;
  int v_bits;
  int64_t first_key;  // its first token
};

/// Where the results of a tile go.
struct TileOutput {
  OutputView out;  // [batch, q_heads, q_len, head_dim]
  float* lse;      // [batch, q_heads, q_len]
  int64_t q_heads;
  int64_t q_tokens;  // tokens of out per head: all packed sequences together
};

/// Attention of one row to a part of the context: o / l is its output, m + ln l its lse.
struct Partial {
  float m, l;
  bool poisoned;
};

// clang-format off
KVCORE_ISA_DECLARE(
/// Reads, balances and quantizes the rows of `source` and resets their state.
void load_tile(const TileSource& source, const Softmax& softmax, RowTile& tile);

/// Adds pages, in order, to every row that sees them.
void attend_pages(RowTile& tile, const Page* pages, int64_t num_pages, const Softmax& softmax);

/// Divides by the sums and writes out and lse.
void store_tile(const RowTile& tile, const TileSource& source, const TileOutput& output);

/// Writes what the pages attended so far came to.
/// partials: [num_rows]; o: [num_rows, head_dim].
void save_partial(const RowTile& tile, Partial* partials, float* o);

/// Sets a tile that load_tile has just filled to the merged state of parts of the context, summed in
/// their order and with exact exponentials: SAS there would decay what was attended early.
/// partials: [num_parts, num_rows]; o: [num_parts, num_rows, head_dim].
void merge_partials(const Partial* partials, const float* o, int64_t num_parts, RowTile& tile);

/// Stage 1 of tokens [token_idx, token_idx + num_tokens) of one head of K (kv = 0) or V (kv = 1) into
/// an 8-bit block; mean and balance may be null.
void quantize_page(const InputView& x, const float* mean, const float* balance, int64_t batch_idx,
                   int64_t head_idx, int64_t token_idx, int64_t num_tokens, int kv, int head_dim,
                   uint8_t* block);
)
// clang-format on

}  // namespace kvcore::turbo
