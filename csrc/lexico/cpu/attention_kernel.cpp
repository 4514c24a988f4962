#include "core/cpu/rows.h"
#include "lexico/cpu/attention_kernels.h"
#include "lexico/cpu/attention_segment.h"

namespace kvcore::lexico::KVCORE_ISA {
namespace {

/// out [width, head_dim] += weights [count, width] transposed times atoms [count, head_dim].
void add_atoms(const float* atoms, const float* weights, int count, int width, int head_dim,
               float* out) {
  constexpr int kRows = 4;
  for (int r = 0; r < width; r += kRows) {
    for (int c = 0; c < head_dim; c += 2 * kLanes) {
      F32 sums[kRows][2];
      for (int i = 0; i < kRows; ++i) {
        sums[i][0] = load(out + (r + i) * head_dim + c);
        sums[i][1] = load(out + (r + i) * head_dim + c + kLanes);
      }
      for (int n = 0; n < count; ++n) {
        const F32 first = load(atoms + n * head_dim + c);
        const F32 second = load(atoms + n * head_dim + c + kLanes);
        for (int i = 0; i < kRows; ++i) {
          const F32 weight = splat(weights[n * width + r + i]);
          sums[i][0] = fma(weight, first, sums[i][0]);
          sums[i][1] = fma(weight, second, sums[i][1]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        store(out + (r + i) * head_dim + c, sums[i][0]);
        store(out + (r + i) * head_dim + c + kLanes, sums[i][1]);
      }
    }
  }
}

}  // namespace

void load_queries_kernel(const AttentionParams& p, const Unit& unit, int width, int64_t lane,
                         int64_t lanes, float* queries) {
  float row[kMaxHeadDim];
  const int head_dim = static_cast<int>(p.head_dim);
  for (int r = 0; r < unit.num_rows && r < width; ++r) {
    const int64_t token = (unit.first_row + r) / unit.group;
    const int64_t head = unit.kv_head * unit.group + (unit.first_row + r) % unit.group;
    widen_row(p.q, unit.batch_idx, head, token, head_dim, row);
    // Scores of +-inf could pass for masked ones: a query that is not finite is NaN throughout.
    float poison = 0;
    for (int i = 0; i < head_dim; ++i) poison += row[i] * 0.0f;
    for (int i = 0; i < head_dim; ++i) {
      queries[i * lanes + lane + r] = row[i] * p.scale + poison;
    }
  }
}

void tables_kernel(const AttentionParams& p, const float* queries, int64_t num_units, int width,
                   int64_t lanes, int64_t atom_begin, int64_t atom_end, float* tables) {
  constexpr int kAtoms = 4;
  const int64_t num_lanes = num_units * width;
  for (int64_t atom = atom_begin; atom < atom_end; atom += kAtoms) {
    // The last rows are computed as often as it takes.
    const float* rows[kAtoms];
    for (int a = 0; a < kAtoms; ++a) {
      rows[a] = p.k_dictionary + (atom + a < atom_end ? atom + a : atom_end - 1) * p.head_dim;
    }
    for (int64_t lane = 0; lane < num_lanes; lane += kLanes) {
      F32 sums[kAtoms] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
      for (int64_t i = 0; i < p.head_dim; ++i) {
        const F32 q = load(queries + i * lanes + lane);
        for (int a = 0; a < kAtoms; ++a) sums[a] = fma(splat(rows[a][i]), q, sums[a]);
      }
      for (int a = 0; a < kAtoms && atom + a < atom_end; ++a) {
        alignas(64) float out[kLanes];
        store(out, sums[a]);
        const int step = width < kLanes ? width : kLanes;
        for (int l = 0; l < kLanes && lane + l < num_lanes; l += step) {
          const int64_t unit = (lane + l) / width, row = (lane + l) % width;
          memcpy(tables + (unit * p.k_atoms + atom + a) * width + row, out + l,
                 step * sizeof(float));
        }
      }
    }
  }
}

SegmentError segment_kernel(const AttentionParams& p, const Unit& unit, const Segment& segment,
                            int width, const float* table, const float* queries, int64_t lanes,
                            const AttentionScratch& scratch, Partial& partial) {
  const SegmentInput in = {p, unit, segment, table, queries, lanes, scratch.scores};
  switch (width) {
    case 4:
      return SegmentPass<4>::run(in, partial);
    case 8:
      return SegmentPass<8>::run(in, partial);
    default:
      return SegmentPass<kMaxRows>::run(in, partial);
  }
}

void finish_kernel(const AttentionParams& p, const Unit& unit, int width, const Partial* partials,
                   int64_t num_partials) {
  alignas(64) float out[kMaxRows * kMaxHeadDim] = {};
  const int head_dim = static_cast<int>(p.head_dim);
  const float minus_inf = -__builtin_inff();
  float max[kMaxRows], sum[kMaxRows], poison[kMaxRows];
  for (int r = 0; r < width; ++r) {
    max[r] = minus_inf;
    sum[r] = poison[r] = 0;
    for (int64_t i = 0; i < num_partials; ++i) {
      max[r] = partials[i].max[r] > max[r] ? partials[i].max[r] : max[r];
      poison[r] += partials[i].poison[r];
    }
  }
  // What a partial's weights count in the whole.
  const auto factor = [&](int64_t i, int r) {
    const float part = partials[i].max[r];
    return part == minus_inf ? 0.0f : exp_nonpositive(part - max[r]);
  };
  alignas(64) float weights[kAtomChunk * kMaxRows];
  for (int64_t i = 0; i < num_partials; ++i) {
    for (int r = 0; r < width; ++r) {
      const float f = factor(i, r);
      sum[r] += f * partials[i].sum[r];
      for (int c = 0; partials[i].has_values && c < head_dim; ++c) {
        out[r * head_dim + c] += f * partials[i].values[r * head_dim + c];
      }
    }
  }
  for (int64_t atom = 0; atom < p.v_atoms; atom += kAtomChunk) {
    const int count =
        static_cast<int>(p.v_atoms - atom < kAtomChunk ? p.v_atoms - atom : kAtomChunk);
    memset(weights, 0, sizeof weights);
    bool any = false;
    for (int64_t i = 0; i < num_partials; ++i) {
      if (!partials[i].has_atoms) continue;
      any = true;
      float factors[kMaxRows];
      for (int r = 0; r < width; ++r) factors[r] = factor(i, r);
      const float* const part = partials[i].atoms + atom * width;
      for (int n = 0; n < count; ++n) {
        for (int r = 0; r < width; ++r) {
          weights[n * width + r] += factors[r] * part[n * width + r];
        }
      }
    }
    if (any) add_atoms(p.v_dictionary + atom * p.head_dim, weights, count, width, head_dim, out);
  }
  for (int r = 0; r < unit.num_rows; ++r) {
    const int64_t token = (unit.first_row + r) / unit.group;
    const int64_t head = unit.kv_head * unit.group + (unit.first_row + r) % unit.group;
    const int64_t row = (unit.batch_idx * p.q_heads + head) * p.q_len + token;
    const float inverse = max[r] == minus_inf ? 0.0f : 1.0f / sum[r];
    for (int c = 0; c < head_dim; ++c) {
      out[r * head_dim + c] = out[r * head_dim + c] * inverse + poison[r];
    }
    narrow_row(out + r * head_dim, head_dim, p.out, row * head_dim);
    p.lse[row] = max[r] == minus_inf ? minus_inf : max[r] + __builtin_logf(sum[r]);
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
