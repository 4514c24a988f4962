// Kernels of lexico_attention: each works on one thread.
//
// A *unit* is up to `width` query rows of one kv head of one sequence; row r is query r / group of
// query head r % group. Its *table* holds the products of its queries and every atom of K. A
// *segment* is a part of the context; a unit's rows go through segments one after the other into a
// *partial* result, whose values are still coefficients of V's atoms. Partials are merged, and the
// weights of all units multiplied by V's atoms together, so that these are read once.
#pragma once

#include "core/cpu/isa.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// Rows of a unit: 4, 8 or kMaxRows. Of four heads a gathered entry of a table is one vector load.
constexpr int kMaxRows = 16;
// Rows of units lie side by side in lanes: queries in blocks of as many as any vector has, weights
// of V's atoms in blocks of more.
constexpr int kQueryLanes = 16, kWeightLanes = 64;
static_assert(kQueryLanes % kMaxRows == 0 && kWeightLanes % kQueryLanes == 0);
// Tokens of the tail that make one segment.
constexpr int64_t kTailSegment = 1024;
static_assert(kTailSegment % kTileTokens == 0 && kTailSegment <= kBlockTokens);
constexpr int kTableChunk = 64;  // atoms of K that are a task
// Atoms of V that are a task, and how many of them pass at a time: they stay in a first-level
// cache.
constexpr int kAtomChunk = 256, kAtomSlice = 128;

struct Unit {
  int64_t batch_idx, kv_head;
  int64_t group, first_row;
  int num_rows;
  int64_t begin[kMaxRows], end[kMaxRows];  // keys that each row sees
};

enum class SegmentKind { kBlock, kTail, kBuffer };

struct Segment {
  SegmentKind kind;
  int64_t first_key, tokens;  // positions [first_key, first_key + tokens) of the sequence
  int64_t idx;                // of the block; the first token in the tail or in the buffer
};

/// Softmax over some of the keys, unnormalised.
struct Partial {
  float max[kMaxRows];     // -inf without a key
  float sum[kMaxRows];     // of exp(score - max)
  float poison[kMaxRows];  // NaN once a row attended a value that is not finite, else 0
  bool has_atoms, has_values;
  float* atoms;            // [v_atoms, width] weights of V's atoms, if has_atoms
  float* values;           // [width, head_dim] weighted sum of buffered values, if has_values
  float factor[kMaxRows];  // what it counts in the whole, once partials are merged
};

/// All partials of a unit.
struct Merged {
  float max[kMaxRows], sum[kMaxRows], poison[kMaxRows];
};

enum class SegmentError { kNone, kKeys, kValues };

/// What the kernels need beside the op's arguments.
struct AttentionScratch {
  float* scores;  // [kBlockTokens or the buffer's tokens, width]
};

// Queries of a unit times the scale into lanes [lane, lane + width) of queries [lanes /
// kQueryLanes, head_dim, kQueryLanes], zeros for rows that are not there; a row that is not finite
// becomes NaN.
KVCORE_ISA_DECLARE(void load_queries_kernel(const AttentionParams& p, const Unit& unit, int width,
                                            int64_t lane, float* queries))

// Rows [atom_begin, atom_end) of the tables [num_units, k_atoms, width].
KVCORE_ISA_DECLARE(void tables_kernel(const AttentionParams& p, const float* queries,
                                      int64_t num_units, int width, int64_t atom_begin,
                                      int64_t atom_end, float* tables))

// Takes a unit through one segment. `table` is the unit's, `queries` its first lane.
KVCORE_ISA_DECLARE(SegmentError segment_kernel(const AttentionParams& p, const Unit& unit,
                                               const Segment& segment, int width,
                                               const float* table, const float* queries,
                                               const AttentionScratch& scratch, Partial& partial))

// What each partial of a unit counts, in order.
KVCORE_ISA_DECLARE(Merged merge_kernel(int width, Partial* partials, int64_t num_partials))

// Weighted sums of V's atoms [atom_begin, atom_end) for up to kWeightLanes lanes, those of the
// units that the partials belong to: values [num_units * width, head_dim]. weights: [kAtomSlice,
// kWeightLanes].
KVCORE_ISA_DECLARE(void values_kernel(const AttentionParams& p, int width, const Partial* partials,
                                      int64_t num_partials, int64_t num_units, int64_t atom_begin,
                                      int64_t atom_end, float* weights, float* values))

// Adds up values [chunks, width, head_dim], chunks lying chunk_stride apart, and those of the
// buffer, and writes a unit's rows of the outputs.
KVCORE_ISA_DECLARE(void finish_kernel(const AttentionParams& p, const Unit& unit, int width,
                                      const Merged& merged, const Partial* partials,
                                      int64_t num_partials, const float* values, int64_t chunks,
                                      int64_t chunk_stride))

}  // namespace kvcore::lexico
