// A unit's pass over one segment. For code that is compiled per ISA level.
#pragma once

#include "core/cpu/rows.h"
#include "lexico/cpu/attention_kernels.h"
#include "lexico/cpu/blocks.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

struct SegmentInput {
  const AttentionParams& p;
  const Unit& unit;
  const Segment& segment;
  const float* table;    // [k_atoms, width]
  const float* queries;  // [head_dim, kQueryLanes], the unit's lanes first
  float* scores;         // [tokens, width]
};

/// int8 coefficients to fp32, kLanes at a time.
inline void widen_coefficients(const int8_t* in, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_s8(in + i));
  for (; i < count; ++i) out[i] = in[i];
}

/// A row of kWidth floats, as wide a vector whatever the level's own.
template <int kWidth>
struct RowVector {
  typedef float type __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
};

template <int kWidth>
struct SegmentPass {
  using Row = typename RowVector<kWidth>::type;
  // Tokens whose sums are in registers at a time.
  static constexpr int kTokens = kVectorRegisters == 32 || kWidth == 4 ? 8 : 4;

  [[gnu::always_inline]] static const Row& row(const float* rows, int64_t i) {
    return *reinterpret_cast<const Row*>(rows + i * kWidth);
  }
  [[gnu::always_inline]] static Row& row(float* rows, int64_t i) {
    return *reinterpret_cast<Row*>(rows + i * kWidth);
  }

  static SegmentError run(const SegmentInput& in, Partial& partial) {
    // Local tokens that some row sees.
    int64_t begin = in.segment.tokens, end = 0;
    for (int r = 0; r < in.unit.num_rows; ++r) {
      const int64_t first = local(in, in.unit.begin[r]), last = local(in, in.unit.end[r]);
      if (first >= last) continue;
      begin = first < begin ? first : begin;
      end = last > end ? last : end;
    }
    if (begin >= end) return SegmentError::kNone;
    Range range = {begin, end};
    if (in.segment.kind != SegmentKind::kBuffer) {
      // Whole tiles; the mask takes away what is too much.
      range = {begin / kTileTokens * kTileTokens,
               (end + kTileTokens - 1) / kTileTokens * kTileTokens};
    }
    if (!score(in, range)) return SegmentError::kKeys;
    mask(in, range);
    Row decay;
    soften(in, range, partial, &decay);
    return add_values(in, range, decay, partial) ? SegmentError::kNone : SegmentError::kValues;
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  static int64_t local(const SegmentInput& in, int64_t key) {
    const int64_t token = key - in.segment.first_key;
    return token < 0 ? 0 : token > in.segment.tokens ? in.segment.tokens : token;
  }

  static const uint8_t* head_data(const SegmentInput& in, const uint8_t* data, int64_t bytes) {
    return data + (in.unit.batch_idx * in.p.kv_heads + in.unit.kv_head) * bytes;
  }

  /// The tile of the tail that begins at a token, with codes of zeros past the tail's tokens.
  static Tile tail_tile(const SegmentInput& in, const uint8_t* tail, int64_t tiles, int64_t width,
                        int64_t token, uint8_t* copy) {
    const int64_t position = in.segment.idx + token;
    const uint8_t* data =
        head_data(in, tail, tiles * tile_bytes(width)) + position / kTileTokens * tile_bytes(width);
    const int64_t valid = in.segment.tokens - token;
    if (valid >= kTileTokens) return tile_at(data, width);
    memcpy(copy, data, tile_bytes(width));
    const MutableTile tile = mutable_tile_at(copy, width);
    for (int64_t lane = valid; lane < kTileTokens; ++lane) {
      tile.scale[lane] = 0;
      for (int64_t j = 0; j < width; ++j) {
        tile.indices[j * kTileTokens + lane] = 0;
        tile.coefficients[j * kTileTokens + lane] = 0;
      }
    }
    return tile_at(copy, width);
  }

  static bool indices_valid(const Tile& tile, int64_t atoms) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < tile.width * kTileTokens; ++i) {
      const uint16_t index = static_cast<uint16_t>(tile.indices[i]);
      largest = index > largest ? index : largest;
    }
    return largest < atoms;
  }

  static void score_tile(const Tile& tile, const float* table, float* scores) {
    alignas(64) float coefficients[kMaxSparsity * kTileTokens];
    widen_coefficients(tile.coefficients, static_cast<int>(tile.width) * kTileTokens, coefficients);
    float scale[kTileTokens];
    for (int lane = 0; lane < kTileTokens; lane += kLanes) {
      // A scale of +-inf becomes NaN: a score of -inf would pass for that of a masked key.
      const F32 factor = load(reinterpret_cast<const Half*>(tile.scale) + lane);
      store(scale + lane, fma(factor, splat(0.0f), factor));
    }
    for (int lane = 0; lane < kTileTokens; lane += kTokens) {
      Row sums[kTokens];
      for (int t = 0; t < kTokens; ++t) sums[t] = Row{};
      for (int64_t j = 0; j < tile.width; ++j) {
        const int16_t* const indices = tile.indices + j * kTileTokens + lane;
        const float* const factors = coefficients + j * kTileTokens + lane;
        for (int t = 0; t < kTokens; ++t) sums[t] += row(table, indices[t]) * factors[t];
      }
      for (int t = 0; t < kTokens; ++t) row(scores, lane + t) = sums[t] * scale[lane + t];
    }
  }

  static bool score(const SegmentInput& in, Range range) {
    if (in.segment.kind == SegmentKind::kBuffer) {
      score_buffer(in, range);
      return true;
    }
    alignas(64) uint8_t copy[tile_bytes(kMaxSparsity)];
    KBlock block = {};
    const uint8_t* data = nullptr;
    if (in.segment.kind == SegmentKind::kBlock) {
      const Block& k = in.p.k_blocks[in.segment.idx];
      if (!open_k_block(head_data(in, k.data, k.bytes), k.bytes, &block)) return false;
      data = block.tiles;
      for (int64_t t = 0; t < range.begin / kTileTokens; ++t) data += tile_bytes(block.widths[t]);
    }
    for (int64_t token = range.begin; token < range.end; token += kTileTokens) {
      Tile tile;
      if (in.segment.kind == SegmentKind::kBlock) {
        tile = tile_at(data, block.widths[token / kTileTokens]);
        data += tile_bytes(tile.width);
      } else {
        tile = tail_tile(in, in.p.k_tail, in.p.k_tiles, in.p.k_sparsity, token, copy);
      }
      if (!indices_valid(tile, in.p.k_atoms)) return false;
      score_tile(tile, in.table, in.scores + token * kWidth);
    }
    return true;
  }

  static void score_buffer(const SegmentInput& in, Range range) {
    float key[kMaxHeadDim];
    const int head_dim = static_cast<int>(in.p.head_dim);
    for (int64_t token = range.begin; token < range.end; ++token) {
      widen_row(in.p.k_buffer, in.unit.batch_idx, in.unit.kv_head, token, head_dim, key);
      F32 zeros = splat(0.0f);
      for (int c = 0; c < head_dim; c += kLanes) zeros = fma(load(key + c), splat(0.0f), zeros);
      // Four sums, since each waits for the sum before it.
      Row sums[4] = {};
      for (int i = 0; i < head_dim; i += 4) {
        for (int k = 0; k < 4; ++k) {
          sums[k] += *reinterpret_cast<const Row*>(in.queries + (i + k) * kQueryLanes) * key[i + k];
        }
      }
      // NaN for a key that is not finite, whose score might be -inf.
      const float poison = reduce_add(zeros);
      row(in.scores, token) = (sums[0] + sums[1]) + (sums[2] + sums[3]) + poison;
    }
  }

  /// -inf for keys that a row does not see; rows that are not there keep what they have.
  static void mask(const SegmentInput& in, Range range) {
    const float minus_inf = -__builtin_inff();
    for (int r = 0; r < in.unit.num_rows; ++r) {
      const int64_t begin = local(in, in.unit.begin[r]), end = local(in, in.unit.end[r]);
      const int64_t first = begin < range.begin ? range.begin
                            : begin < range.end ? begin
                                                : range.end;
      const int64_t last = end < first ? first : end < range.end ? end : range.end;
      for (int64_t t = range.begin; t < first; ++t) in.scores[t * kWidth + r] = minus_inf;
      for (int64_t t = last; t < range.end; ++t) in.scores[t * kWidth + r] = minus_inf;
    }
  }

  /// Scores to weights. `decay` is what earlier sums are multiplied by.
  static void soften(const SegmentInput& in, Range range, Partial& partial, Row* decay) {
    const float minus_inf = -__builtin_inff();
    // As many lanes as rows or more, so that lane i of a vector at offset o belongs to row
    // (o + i) % kWidth.
    constexpr int kPeriod = kWidth > kLanes ? kWidth : kLanes;
    constexpr int kVectors = kPeriod / kLanes;
    const int64_t first = range.begin * kWidth, last = range.end * kWidth;
    F32 best[kVectors];
    for (int v = 0; v < kVectors; ++v) best[v] = splat(minus_inf);
    int64_t i = first;
    for (; i + kPeriod <= last; i += kPeriod) {
      // max returns its second operand where one is NaN: a NaN does not become the maximum.
      for (int v = 0; v < kVectors; ++v) best[v] = max(load(in.scores + i + v * kLanes), best[v]);
    }
    alignas(64) float lanes[kPeriod];
    for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes, best[v]);
    for (int64_t k = i; k < last; ++k) {
      if (in.scores[k] > lanes[k - i]) lanes[k - i] = in.scores[k];
    }
    alignas(64) float base[kPeriod];
    for (int r = 0; r < kWidth; ++r) {
      float largest = minus_inf;
      for (int k = r; k < kPeriod; k += kWidth) largest = lanes[k] > largest ? lanes[k] : largest;
      const float old = partial.max[r];
      const float now = largest > old ? largest : old;
      (*decay)[r] = old == minus_inf ? 0.0f : exp_nonpositive(old - now);
      partial.max[r] = now;
      // Nothing but -inf: 0 in its place gives weights of 0 instead of NaN.
      for (int k = r; k < kPeriod; k += kWidth) base[k] = now == minus_inf ? 0.0f : now;
    }
    F32 sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = splat(0.0f);
    for (i = first; i + kPeriod <= last; i += kPeriod) {
      for (int v = 0; v < kVectors; ++v) {
        float* const at = in.scores + i + v * kLanes;
        const F32 weight = exp_nonpositive(load(at) - load(base + v * kLanes));
        store(at, weight);
        sums[v] = sums[v] + weight;
      }
    }
    for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes, sums[v]);
    for (int64_t k = i; k < last; ++k) {
      in.scores[k] = exp_nonpositive(in.scores[k] - base[k - i]);
      lanes[k - i] += in.scores[k];
    }
    for (int r = 0; r < kWidth; ++r) {
      float sum = 0;
      for (int k = r; k < kPeriod; k += kWidth) sum += lanes[k];
      partial.sum[r] = partial.sum[r] * (*decay)[r] + sum;
      // A row whose every score is NaN: its maximum must not say that it sees no key.
      if (sum != sum && partial.max[r] == minus_inf) partial.max[r] = 0;
    }
  }

  /// Multiplies weights by the values' scales. One that is not finite poisons the rows that see its
  /// token, and no others: 0 in its place, since 0 * inf is NaN.
  static void scale_weights(const SegmentInput& in, int64_t token, const uint16_t* scale,
                            Partial& partial) {
    for (int lane = 0; lane < kTileTokens; ++lane) {
      float factor = widen(Half{scale[lane]});
      if (factor * 0.0f != 0.0f) {
        factor = 0;
        for (int r = 0; r < in.unit.num_rows; ++r) {
          const int64_t key = in.segment.first_key + token + lane;
          if (key >= in.unit.begin[r] && key < in.unit.end[r]) {
            partial.poison[r] = __builtin_nanf("");
          }
        }
      }
      Row& weight = row(in.scores, token + lane);
      weight *= factor;
    }
  }

  static bool add_values(const SegmentInput& in, Range range, const Row& decay, Partial& partial) {
    if (partial.has_values) {
      for (int r = 0; r < kWidth; ++r) {
        for (int c = 0; c < in.p.head_dim; ++c) partial.values[r * in.p.head_dim + c] *= decay[r];
      }
    }
    if (in.segment.kind == SegmentKind::kBlock) return add_block(in, range, decay, partial);
    if (partial.has_atoms) {
      for (int64_t n = 0; n < in.p.v_atoms; ++n) row(partial.atoms, n) *= decay;
    }
    if (in.segment.kind == SegmentKind::kTail) return add_tail(in, range, partial);
    add_buffer(in, range, partial);
    return true;
  }

  static bool add_block(const SegmentInput& in, Range range, const Row& decay, Partial& partial) {
    const Block& data = in.p.v_blocks[in.segment.idx];
    VBlock block;
    if (!open_v_block(head_data(in, data.data, data.bytes), data.bytes, in.p.v_atoms, &block)) {
      return false;
    }
    uint16_t largest = 0;
    for (int64_t i = 0; i < block.pairs; ++i) {
      largest = block.tokens[i] > largest ? block.tokens[i] : largest;
    }
    if (largest >= kBlockTokens) return false;
    memset(in.scores, 0, range.begin * kWidth * sizeof(float));
    memset(in.scores + range.end * kWidth, 0, (kBlockTokens - range.end) * kWidth * sizeof(float));
    for (int64_t token = range.begin; token < range.end; token += kTileTokens) {
      scale_weights(in, token, block.scale + token, partial);
    }
    const uint16_t* tokens = block.tokens;
    const int8_t* coefficients = block.coefficients;
    for (int64_t n = 0; n < in.p.v_atoms; ++n) {
      const int count = block.counts[n];
      Row sum;
      sum_pairs(in.scores, tokens, coefficients, count, &sum);
      Row& atom = row(partial.atoms, n);
      atom = partial.has_atoms ? atom * decay + sum : sum;
      tokens += count;
      coefficients += count;
    }
    partial.has_atoms = true;
    return true;
  }

  /// sum = sum_i coefficients[i] * weights[tokens[i]].
  [[gnu::always_inline]] static void sum_pairs(const float* weights, const uint16_t* tokens,
                                               const int8_t* coefficients, int count, Row* sum) {
    Row sums[2] = {};
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      sums[0] += row(weights, tokens[i]) * static_cast<float>(coefficients[i]);
      sums[1] += row(weights, tokens[i + 1]) * static_cast<float>(coefficients[i + 1]);
    }
    if (i < count) sums[0] += row(weights, tokens[i]) * static_cast<float>(coefficients[i]);
    *sum = sums[0] + sums[1];
  }

  static bool add_tail(const SegmentInput& in, Range range, Partial& partial) {
    alignas(64) uint8_t copy[tile_bytes(kMaxSparsity)];
    alignas(64) float coefficients[kMaxSparsity * kTileTokens];
    if (!partial.has_atoms) {
      memset(partial.atoms, 0, in.p.v_atoms * kWidth * sizeof(float));
      partial.has_atoms = true;
    }
    for (int64_t token = range.begin; token < range.end; token += kTileTokens) {
      const Tile tile = tail_tile(in, in.p.v_tail, in.p.v_tiles, in.p.v_sparsity, token, copy);
      if (!indices_valid(tile, in.p.v_atoms)) return false;
      scale_weights(in, token, tile.scale, partial);
      widen_coefficients(tile.coefficients, static_cast<int>(tile.width) * kTileTokens,
                         coefficients);
      for (int lane = 0; lane < kTileTokens; ++lane) {
        const Row weight = row(in.scores, token + lane);
        for (int64_t j = 0; j < tile.width; ++j) {
          row(partial.atoms, tile.indices[j * kTileTokens + lane]) +=
              weight * coefficients[j * kTileTokens + lane];
        }
      }
    }
    return true;
  }

  static void add_buffer(const SegmentInput& in, Range range, Partial& partial) {
    const int head_dim = static_cast<int>(in.p.head_dim);
    if (!partial.has_values) {
      memset(partial.values, 0, kWidth * head_dim * sizeof(float));
      partial.has_values = true;
    }
    float value[kMaxHeadDim];
    for (int64_t token = range.begin; token < range.end; ++token) {
      widen_row(in.p.v_buffer, in.unit.batch_idx, in.unit.kv_head, token, head_dim, value);
      const int64_t key = in.segment.first_key + token;
      for (int r = 0; r < in.unit.num_rows; ++r) {
        // 0 * NaN is NaN: values that a row does not see must not reach its sum.
        if (key < in.unit.begin[r] || key >= in.unit.end[r]) continue;
        const F32 weight = splat(in.scores[token * kWidth + r]);
        float* const out = partial.values + r * head_dim;
        for (int c = 0; c < head_dim; c += kLanes) {
          store(out + c, fma(weight, load(value + c), load(out + c)));
        }
      }
    }
  }
};

}  // namespace kvcore::lexico::KVCORE_ISA
