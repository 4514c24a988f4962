// What the attention kernels get, and what a unit of query rows sees.
//
// A *unit* is up to kUnitRows query rows of one kv head of one sequence; row r is query r / group
// of query head r % group. A *slot* is a place for a token: those of blocks, of the tail's
// capacity, of the buffer. A *segment* is a block, a part of the tail or a part of the buffer.
#pragma once

#include "core/cuda/elements.cuh"
#include "core/error_flags.h"
#include "lexico/cuda/heuristics.h"
#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

struct AttentionArgs {
  AttentionParams p;  // its blocks travel apart
  AttentionPlan plan;
  // The units of this wave; the arrays below are theirs.
  int64_t first_unit, num_units;
  float* tables;     // [num_units, k_atoms, rows] products with K's atoms
  float* queries;    // [num_units, rows, head_dim] times the scale
  float* factors;    // [num_units, rows] of scores: 1, or NaN for a query that is not finite
  float* scores;     // [num_units, num_slots, rows], written where some row sees the token
  float* chunk_max;  // [num_units, num_chunks, rows]
  float* sums;       // [num_units, segments, rows] of exp(score - max)
  float* weights;    // [num_units, coded segments, v_atoms, rows]
  float* values;     // [num_units, buffer segments, rows, head_dim]
  float* products;   // [atom_chunks, num_units, rows, head_dim]
  uint32_t* error_flags;
};

/// Blocks of K or of V, as many as one launch serves.
struct LaunchBlocks {
  int64_t first, count;
  Block block[kLaunchBlocks];
};

/// Positions [begin, end) of a sequence.
struct KeyRange {
  int64_t begin, end;
};

struct Unit {
  int64_t idx;  // of the wave
  int64_t batch_idx, kv_head;
  int64_t first_row;
  int num_rows;
  int64_t tail_len, buffer_len, kv_len, padding;
  ErrorFlag error;  // the lengths are out of range, or 0
  KeyRange span;    // no row sees a key outside of it

  __device__ int64_t head_idx(const AttentionArgs& args) const {
    return batch_idx * args.p.kv_heads + kv_head;
  }
  __device__ int64_t token(const AttentionArgs& args, int row) const {
    return (first_row + row) / args.plan.group;
  }
  __device__ int64_t q_head(const AttentionArgs& args, int row) const {
    return kv_head * args.plan.group + (first_row + row) % args.plan.group;
  }
  /// What a row sees; nothing where there is no such row.
  __device__ KeyRange keys(const AttentionArgs& args, int row) const {
    if (row >= num_rows) return {0, 0};
    const AttentionParams& p = args.p;
    const int64_t own_end = token(args, row) + kv_len - p.q_len + 1;
    return {max(padding, p.window > 0 ? own_end - p.window : int64_t{0}),
            p.causal ? min(kv_len, own_end) : kv_len};
  }
};

__device__ inline Unit make_unit(const AttentionArgs& args, int64_t idx) {
  const AttentionParams& p = args.p;
  const AttentionPlan& plan = args.plan;
  const int64_t unit_idx = args.first_unit + idx;
  Unit unit = {};
  unit.idx = idx;
  unit.batch_idx = unit_idx / plan.tiles / p.kv_heads;
  unit.kv_head = unit_idx / plan.tiles % p.kv_heads;
  unit.first_row = unit_idx % plan.tiles * kUnitRows;
  unit.num_rows = static_cast<int>(min(int64_t{kUnitRows}, plan.num_rows - unit.first_row));
  unit.tail_len = p.tail_lens[unit.batch_idx];
  unit.buffer_len = p.buffer_lens != nullptr ? p.buffer_lens[unit.batch_idx] : p.buffer_len;
  unit.padding = p.left_padding != nullptr ? p.left_padding[unit.batch_idx] : 0;
  unit.error = unit.tail_len < 0 || unit.tail_len > plan.tail_slots    ? kErrorTailLens
               : unit.buffer_len < 0 || unit.buffer_len > p.buffer_len ? kErrorBufferLens
               : unit.padding < 0 || unit.padding > plan.num_slots     ? kErrorLeftPadding
                                                                       : ErrorFlag{};
  unit.kv_len = p.num_blocks * kBlockTokens + unit.tail_len + unit.buffer_len;
  // Rows are in the order of tokens, and so are both ends of what they see.
  unit.span = {unit.keys(args, 0).begin, unit.keys(args, unit.num_rows - 1).end};
  return unit;
}

/// Tokens at consecutive slots and positions.
struct Part {
  int64_t first_slot, first_key;
  int tokens;

  /// Its tokens [begin, end) lie in the span.
  __device__ int seen_begin(const Unit& unit) const {
    return static_cast<int>(min(max(unit.span.begin - first_key, int64_t{0}), int64_t{tokens}));
  }
  __device__ int seen_end(const Unit& unit) const {
    return static_cast<int>(min(max(unit.span.end - first_key, int64_t{0}), int64_t{tokens}));
  }
  __device__ bool is_seen(const Unit& unit) const { return seen_begin(unit) < seen_end(unit); }
};

/// Tokens [first, first + count) of the tail, as far as there are so many.
__device__ inline Part tail_part(const AttentionArgs& args, const Unit& unit, int64_t first,
                                 int64_t count) {
  const int64_t slot = args.p.num_blocks * kBlockTokens + first;
  return {slot, slot, static_cast<int>(min(max(unit.tail_len - first, int64_t{0}), count))};
}
__device__ inline Part buffer_part(const AttentionArgs& args, const Unit& unit, int64_t segment) {
  const int64_t first = segment * kBufferSegment, begin = args.p.num_blocks * kBlockTokens;
  return {begin + args.plan.tail_slots + first, begin + unit.tail_len + first,
          static_cast<int>(min(max(unit.buffer_len - first, int64_t{0}), kBufferSegment))};
}
__device__ inline Part segment_part(const AttentionArgs& args, const Unit& unit, int64_t segment) {
  const Segments& all = args.plan.segments;
  if (segment < all.blocks) {
    return {segment * kBlockTokens, segment * kBlockTokens, kBlockTokens};
  }
  if (segment < all.coded()) {
    return tail_part(args, unit, (segment - all.blocks) * kTailSegment, kTailSegment);
  }
  return buffer_part(args, unit, segment - all.coded());
}

/// What each row of a unit sees of a part, relative to its first token; in registers or shared
/// memory.
template <int kRows>
struct RowsOfPart {
  int begin[kRows], end[kRows];

  __device__ bool sees(int row, int token) const { return token >= begin[row] && token < end[row]; }
  __device__ void set(const AttentionArgs& args, const Unit& unit, const Part& part, int row) {
    const KeyRange keys = unit.keys(args, row);
    begin[row] =
        static_cast<int>(min(max(keys.begin - part.first_key, int64_t{0}), int64_t{part.tokens}));
    end[row] =
        static_cast<int>(min(max(keys.end - part.first_key, int64_t{0}), int64_t{part.tokens}));
  }
};

/// The rows' entries of one atom or token, side by side: one access to memory.
template <class E, int kRows>
struct alignas(sizeof(E) * kRows) RowEntry {
  E x[kRows];
};
/// In fp32, 16 bytes at a time.
template <int kRows>
struct alignas(16) RowFloats {
  float x[kRows];
};

/// The power of two that is above a finite x >= 0 and at most twice it, within the normal numbers.
__device__ __forceinline__ float power_above(float x) {
  const unsigned field = __float_as_uint(x) >> 23;
  return __uint_as_float(min(max(field + 1, 1u), 253u) << 23);
}
/// 1 / x of such a power.
__device__ __forceinline__ float inverse_of_power(float x) {
  return __uint_as_float((254u << 23) - __float_as_uint(x));
}

constexpr float kLog2e = 1.44269504f;
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }

}  // namespace kvcore::lexico
