#include "core/cpu/gemm.h"
#include "core/cpu/rows.h"
#include "lexico/cpu/attention_kernels.h"
#include "lexico/cpu/attention_segment.h"

namespace kvcore::lexico::KVCORE_ISA {
namespace {

constexpr int kCacheLine = 16;  // floats

/// Asks for n floats that are read soon: rows of a dictionary are read in an order that the CPU
/// does not foresee.
inline void prefetch(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kCacheLine) __builtin_prefetch(x + i);
}

constexpr int kTileAtoms = kVectorRegisters == 32 ? 8 : 4;

/// Products of kTileAtoms atoms and kVectors vectors of lanes.
template <int kVectors>
[[gnu::flatten]] inline void table_tile(const float* const* atoms, const float* queries,
                                        int64_t lane, int64_t head_dim, float* out) {
  const float* lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = lane + v * kLanes;
    lanes[v] = queries + first / kQueryLanes * head_dim * kQueryLanes + first % kQueryLanes;
  }
  F32 sums[kTileAtoms][kVectors];
  unroll<kTileAtoms>([&](int a) { unroll<kVectors>([&](int v) { sums[a][v] = splat(0.0f); }); });
  for (int64_t i = 0; i < head_dim; ++i) {
    F32 q[kVectors];
    unroll<kVectors>([&](int v) { q[v] = load(lanes[v] + i * kQueryLanes); });
    unroll<kTileAtoms>([&](int a) {
      const F32 x = splat(atoms[a][i]);
      unroll<kVectors>([&](int v) { sums[a][v] = fma(x, q[v], sums[a][v]); });
    });
  }
  unroll<kTileAtoms>([&](int a) {
    unroll<kVectors>([&](int v) { store(out + (a * kVectors + v) * kLanes, sums[a][v]); });
  });
}

/// Rows [atom_begin, atom_end) of the tables of units of kWidth rows.
template <int kWidth>
void fill_tables(const AttentionParams& p, const float* queries, int64_t num_units,
                 int64_t atom_begin, int64_t atom_end, float* tables) {
  constexpr int kWide = 2;
  // A vector may have several units, a unit several vectors.
  constexpr int kStep = kWidth < kLanes ? kWidth : kLanes;
  const int64_t num_lanes = num_units * kWidth;
  // Lanes outside: their queries stay in the first-level cache while the atoms pass.
  for (int64_t lane = 0; lane < num_lanes; lane += kWide * kLanes) {
    const int vectors = lane + kLanes < num_lanes ? kWide : 1;
    const int64_t end = lane + vectors * kLanes < num_lanes ? lane + vectors * kLanes : num_lanes;
    for (int64_t atom = atom_begin; atom < atom_end; atom += kTileAtoms) {
      const int count =
          static_cast<int>(atom + kTileAtoms < atom_end ? kTileAtoms : atom_end - atom);
      // The last rows are computed as often as it takes.
      const float* rows[kTileAtoms];
      for (int a = 0; a < kTileAtoms; ++a) {
        rows[a] = p.k_dictionary + (atom + (a < count ? a : count - 1)) * p.head_dim;
      }
      if (lane == 0 && atom + 2 * kTileAtoms <= p.k_atoms) {
        prefetch(rows[0] + kTileAtoms * p.head_dim, kTileAtoms * p.head_dim);
      }
      alignas(64) float out[kTileAtoms * kWide * kLanes];
      if (vectors == kWide) {
        table_tile<kWide>(rows, queries, lane, p.head_dim, out);
      } else {
        table_tile<1>(rows, queries, lane, p.head_dim, out);
      }
      for (int64_t l = lane; l < end; l += kStep) {
        float* const own = tables + (l / kWidth * p.k_atoms + atom) * kWidth + l % kWidth;
        for (int a = 0; a < count; ++a) {
          memcpy(own + a * kWidth, out + a * vectors * kLanes + (l - lane), kStep * sizeof(float));
        }
      }
    }
  }
}

/// Weights of atoms [atom, atom + count) in a unit's lanes of weights [kAtomSlice, kWeightLanes].
template <int kWidth>
void merge_weights(const Partial* partials, int64_t num_partials, int64_t atom, int count,
                   float* weights) {
  using Row = typename RowVector<kWidth>::type;
  const auto at = [&](int n) -> Row& {
    return *reinterpret_cast<Row*>(weights + n * kWeightLanes);
  };
  for (int n = 0; n < count; ++n) at(n) = Row{};
  for (int64_t i = 0; i < num_partials; ++i) {
    if (!partials[i].has_atoms) continue;
    const Row factor = *reinterpret_cast<const Row*>(partials[i].factor);
    const Row* const part = reinterpret_cast<const Row*>(partials[i].atoms + atom * kWidth);
    for (int n = 0; n < count; ++n) at(n) += factor * part[n];
  }
}

}  // namespace

void load_queries_kernel(const AttentionParams& p, const Unit& unit, int width, int64_t lane,
                         float* queries) {
  float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  for (int r = 0; r < unit.num_rows && r < width; ++r) {
    const int64_t token = (unit.first_row + r) / unit.group;
    const int64_t head = unit.kv_head * unit.group + (unit.first_row + r) % unit.group;
    widen_row(p.q, unit.batch_idx, head, token, head_dim, row);
    // Scores of +-inf could pass for masked ones: a query that is not finite is NaN throughout.
    float poison = 0;
    for (int i = 0; i < head_dim; ++i) poison += row[i] * 0.0f;
    float* const own = queries + lane / kQueryLanes * head_dim * kQueryLanes + lane % kQueryLanes;
    for (int i = 0; i < head_dim; ++i) own[i * kQueryLanes + r] = row[i] * p.scale + poison;
  }
}

void tables_kernel(const AttentionParams& p, const float* queries, int64_t num_units, int width,
                   int64_t atom_begin, int64_t atom_end, float* tables) {
  const auto fill = width == 4   ? fill_tables<4>
                    : width == 8 ? fill_tables<8>
                                 : fill_tables<kMaxRows>;
  fill(p, queries, num_units, atom_begin, atom_end, tables);
}

SegmentError segment_kernel(const AttentionParams& p, const Unit& unit, const Segment& segment,
                            int width, const float* table, const float* queries,
                            const AttentionScratch& scratch, Partial& partial) {
  const SegmentInput in = {p, unit, segment, table, queries, scratch.scores};
  switch (width) {
    case 4:
      return SegmentPass<4>::run(in, partial);
    case 8:
      return SegmentPass<8>::run(in, partial);
    default:
      return SegmentPass<kMaxRows>::run(in, partial);
  }
}

Merged merge_kernel(int width, Partial* partials, int64_t num_partials) {
  const float minus_inf = -__builtin_inff();
  Merged merged = {};
  for (int r = 0; r < width; ++r) {
    float largest = minus_inf;
    for (int64_t i = 0; i < num_partials; ++i) {
      largest = partials[i].max[r] > largest ? partials[i].max[r] : largest;
      merged.poison[r] += partials[i].poison[r];
    }
    for (int64_t i = 0; i < num_partials; ++i) {
      const float part = partials[i].max[r];
      partials[i].factor[r] = part == minus_inf ? 0.0f : exp_nonpositive(part - largest);
      merged.sum[r] += partials[i].factor[r] * partials[i].sum[r];
    }
    merged.max[r] = largest;
  }
  return merged;
}

void values_kernel(const AttentionParams& p, int width, const Partial* partials,
                   int64_t num_partials, int64_t num_units, int64_t atom_begin, int64_t atom_end,
                   float* weights, float* values) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int num_lanes = static_cast<int>(num_units) * width;
  const int rows = (num_lanes + kProductMultiple - 1) / kProductMultiple * kProductMultiple;
  for (int64_t atom = atom_begin; atom < atom_end; atom += kAtomSlice) {
    const int count = static_cast<int>(atom_end - atom < kAtomSlice ? atom_end - atom : kAtomSlice);
    const float* const atoms = p.v_dictionary + atom * head_dim;
    prefetch(atoms, count * head_dim);
    for (int n = 0; n < count; ++n) {
      for (int lane = num_lanes; lane < rows; ++lane) weights[n * kWeightLanes + lane] = 0;
    }
    auto* const merge = width == 4   ? merge_weights<4>
                        : width == 8 ? merge_weights<8>
                                     : merge_weights<kMaxRows>;
    for (int64_t u = 0; u < num_units; ++u) {
      merge(partials + u * num_partials, num_partials, atom, count, weights + u * width);
    }
    product<Fp32Operand, 1, kWeightLanes>(weights, atoms, head_dim, values, head_dim, rows,
                                          head_dim, count, Part::kAll,
                                          atom == atom_begin ? Onto{} : kOntoC);
  }
}

void finish_kernel(const AttentionParams& p, const Unit& unit, int width, const Merged& merged,
                   const Partial* partials, int64_t num_partials, const float* values,
                   int64_t chunks, int64_t chunk_stride) {
  const float minus_inf = -__builtin_inff();
  const int head_dim = static_cast<int>(p.head_dim);
  for (int r = 0; r < unit.num_rows && r < width; ++r) {
    alignas(64) float out[kMaxHeadDim] = {};
    const auto add = [&](const float* x, float factor) {
      for (int c = 0; c < head_dim; c += kLanes) {
        store(out + c, fma(splat(factor), load(x + c), load(out + c)));
      }
    };
    for (int64_t i = 0; i < num_partials; ++i) {
      if (partials[i].has_values) add(partials[i].values + r * head_dim, partials[i].factor[r]);
    }
    for (int64_t i = 0; i < chunks; ++i) add(values + i * chunk_stride + r * head_dim, 1.0f);
    const int64_t token = (unit.first_row + r) / unit.group;
    const int64_t head = unit.kv_head * unit.group + (unit.first_row + r) % unit.group;
    const int64_t row = (unit.batch_idx * p.q_heads + head) * p.q_len + token;
    const bool sees_none = merged.max[r] == minus_inf;
    const float inverse = sees_none ? 0.0f : 1.0f / merged.sum[r];
    for (int c = 0; c < head_dim; ++c) out[c] = out[c] * inverse + merged.poison[r];
    narrow_row(out, head_dim, p.out, row * head_dim);
    p.lse[row] = sees_none ? minus_inf : merged.max[r] + __builtin_logf(merged.sum[r]);
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
