#include <cmath>

#include "core/cpu/rows.h"
#include "lexico/cpu/coefficients.h"
#include "lexico/cpu/correlate.h"
#include "lexico/cpu/encode_kernels.h"
#include "lexico/cpu/pursuit.h"
#if defined(KVCORE_ISA_AMX)
#include "lexico/cpu/search_tiles.h"
#endif

namespace kvcore::lexico::KVCORE_ISA {
namespace {

/// Loads a vector multiplied by the power of two that brings its largest channel into [1, 2), so
/// that no square over- or underflows; false if it is zero or not finite.
bool load_vector(const EncodeParams& p, int64_t vector_idx, float* vector, Pursuit& pursuit) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t token = vector_idx % p.tokens, head = vector_idx / p.tokens % p.heads;
  widen_row(p.x, vector_idx / p.tokens / p.heads, head, token, head_dim, vector);
  F32 lanes = splat(0.0f), poison = splat(0.0f);
  for (int i = 0; i < head_dim; i += kLanes) {
    const F32 x = load(vector + i);
    lanes = max(abs(x), lanes);
    poison = poison + x * splat(0.0f);  // NaN if x is not finite
  }
  const float amax = reduce_max(lanes), zero = reduce_add(poison);
  pursuit.vector_idx = vector_idx;
  pursuit.count = 0;
  pursuit.exponent = 0;
  pursuit.norm_squared = zero;
  pursuit.energy = zero;
  if (!(zero == 0) || amax == 0) return false;
  pursuit.exponent = __builtin_ilogbf(amax);
  // Two steps: 2^-exponent itself may not be a float.
  const int half = pursuit.exponent / 2;
  const F32 first = splat(__builtin_ldexpf(1.0f, -half));
  const F32 second = splat(__builtin_ldexpf(1.0f, half - pursuit.exponent));
  for (int i = 0; i < head_dim; i += kLanes) {
    const F32 x = load(vector + i) * first * second;
    store(vector + i, x);
  }
  double squared = 0;
  for (int i = 0; i < head_dim; ++i) squared += double{vector[i]} * vector[i];
  pursuit.norm_squared = squared;
  pursuit.energy = squared;
  return true;
}

float dot(const float* a, const float* b, int head_dim) {
  F32 sums[2] = {splat(0.0f), splat(0.0f)};
  for (int i = 0; i < head_dim; i += 2 * kLanes) {
    sums[0] = fma(load(a + i), load(b + i), sums[0]);
    sums[1] = fma(load(a + i + kLanes), load(b + i + kLanes), sums[1]);
  }
  return reduce_add(sums[0] + sums[1]);
}

/// residual = vector - what the selected atoms explain.
void compute_residual(const EncodeParams& p, const Pursuit& pursuit, const float* vector,
                      float* residual) {
  const int head_dim = static_cast<int>(p.head_dim);
  memcpy(residual, vector, head_dim * sizeof(float));
  for (int j = 0; j < pursuit.count; ++j) {
    const float* atom = p.dictionary + pursuit.atoms[j] * p.head_dim;
    const F32 value = splat(static_cast<float>(-pursuit.values[j]));
    for (int i = 0; i < head_dim; i += kLanes) {
      store(residual + i, fma(value, load(atom + i), load(residual + i)));
    }
  }
}

/// Writes the code of a vector.
void finish(const EncodeParams& p, const Pursuit& pursuit, const float* vector) {
  const int64_t row = pursuit.vector_idx * p.sparsity;
  int16_t* const indices = p.indices + row;
  for (int j = 0; j < p.sparsity; ++j) {
    indices[j] = static_cast<int16_t>(j < pursuit.count ? pursuit.atoms[j] : 0);
  }
  const bool finite = pursuit.norm_squared == pursuit.norm_squared;
  const Coefficients out = {.values = pursuit.values,
                            .count = pursuit.count,
                            .exponent = pursuit.exponent,
                            .sparsity = static_cast<int>(p.sparsity),
                            .finite = finite};
  p.scale[pursuit.vector_idx] = store_coefficients(p, out, row);
  float relative = 0;
  if (!finite) {
    relative = bits_to_float(kNaN32);
  } else if (pursuit.norm_squared > 0) {
    float residual[kMaxHeadDim];
    compute_residual(p, pursuit, vector, residual);
    double squared = 0;
    for (int i = 0; i < p.head_dim; ++i) squared += double{residual[i]} * residual[i];
    relative = static_cast<float>(__builtin_sqrt(squared / pursuit.norm_squared));
  }
  p.residual[pursuit.vector_idx] = relative;
}

/// The atom most correlated with what `s` leaves of its vector: correlations with the vector minus
/// those with what is explained, sum_j values[j] * gram[atoms[j]].
[[gnu::flatten]] Best search_gram(const EncodeParams& p, const float* gram, const Pursuit& s,
                                  const float* correlations) {
  const float* rows[kMaxSparsity];
  float values[kMaxSparsity];
  const int count = s.count;
  for (int j = 0; j < count; ++j) {
    rows[j] = gram + s.atoms[j] * p.atoms;
    values[j] = static_cast<float>(-s.values[j]);
  }
  LaneBest best = LaneBest::none();
  F32 index = to_f32(iota());
  const auto update = [&](const F32(&acc)[4]) {
    unroll<4>([&](int c) {
      best.update(acc[c], index);
      index = index + splat(static_cast<float>(kLanes));
    });
  };
  constexpr int kGroup = 4 * kLanes;
  int64_t n = 0;
  for (; n + kGroup <= p.atoms; n += kGroup) {
    F32 acc[4];
    unroll<4>([&](int c) { acc[c] = load(correlations + n + c * kLanes); });
    for (int j = 0; j < count; ++j) {
      const F32 value = splat(values[j]);
      const float* row = rows[j] + n;
      unroll<4>([&](int c) { acc[c] = fma(value, load(row + c * kLanes), acc[c]); });
    }
    update(acc);
  }
  if (n < p.atoms) {
    // Rows end here; correlations are padded with zeros.
    F32 acc[4];
    unroll<4>([&](int c) { acc[c] = load(correlations + n + c * kLanes); });
    for (int j = 0; j < count; ++j) {
      alignas(64) float row[kGroup] = {};
      for (int64_t i = n; i < p.atoms; ++i) row[i - n] = rows[j][i];
      const F32 value = splat(values[j]);
      unroll<4>([&](int c) { acc[c] = fma(value, load(row + c * kLanes), acc[c]); });
    }
    update(acc);
  }
  return reduce(best);
}

/// correlations [rows rounded up to kRowTile, padded_atoms] of `rows` vectors with every atom.
void correlate_all(const EncodeParams& p, const float* panels, const float* vectors, int rows,
                   float* correlations, int64_t stride) {
  const int head_dim = static_cast<int>(p.head_dim);
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int row = 0; row < rows; row += kRowTile) {
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        F32 acc[kRowTile][kChunks];
        correlate_tile(vectors + row * head_dim, panels + panel * head_dim * kPanelAtoms + atom,
                       head_dim, acc);
        float* const out = correlations + row * stride + panel * kPanelAtoms + atom;
        for (int r = 0; r < kRowTile; ++r) {
          for (int c = 0; c < kChunks; ++c) store(out + r * stride + c * kLanes, acc[r][c]);
        }
      }
    }
  }
}

#if defined(KVCORE_ISA_AVX512_BF16)

/// The largest product with the residual, in fp32, of the atoms that it can be of.
Best rescore(const EncodeParams& p, const LaneBestTwo& lanes, const float* residual) {
  const int head_dim = static_cast<int>(p.head_dim);
  float values[2][kLanes], indices[2][kLanes];
  float largest = 0;
  for (int i = 0; i < 2; ++i) {
    store(values[i], lanes.value[i]);
    store(indices[i], lanes.index[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = values[0][lane] > largest ? values[0][lane] : largest;
  }
  // Each factor is off by 2^-9 of itself at most, so a product with an atom of norm 1 by 2^-8 of
  // the residual's norm, and of two products that the rounding exchanges by twice that.
  const float norm = __builtin_sqrtf(dot(residual, residual, head_dim));
  const float least = largest - 0x1.02p-7f * norm;
  Best best = {-1, 0};
  for (int i = 0; i < 2; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(values[i][lane] >= least)) continue;
      const int32_t index = static_cast<int32_t>(indices[i][lane]);
      const float product = dot(residual, p.dictionary + index * p.head_dim, head_dim);
      const float magnitude = product < 0 ? -product : product;
      const bool first = magnitude == best.value && index < best.index;
      if (magnitude > best.value || first) best = {magnitude, index};
    }
  }
  return best;
}

// Adds the products with all atoms to what is known of the first `rows` of kRecomputeBlock rows.
#if defined(KVCORE_ISA_AMX)
void search_panels(const EncodeParams& p, const uint32_t* panels, const uint32_t* pairs, int rows,
                   LaneBestTwo* best) {
  const int head_dim = static_cast<int>(p.head_dim);
  configure_search_tiles();
  const int num_groups = (rows + kTileMaxRows - 1) / kTileMaxRows;
  alignas(64) float products[kRecomputeBlock * kLanes];
  for (int64_t atom = 0; atom < padded_atoms(p.atoms); atom += kLanes) {
    const int64_t panel = atom / kPanelAtoms * kPanelAtoms;
    const uint32_t* const first = panels + panel * (head_dim / 2) + (atom - panel);
    correlate_tiles(pairs, num_groups, first, head_dim, products);
    const F32 index = to_f32(add_i32(iota(), splat_i32(static_cast<int32_t>(atom))));
    for (int row = 0; row < rows; ++row) best[row].update(load(products + row * kLanes), index);
  }
  tile_release();
}
#else
void search_panels(const EncodeParams& p, const uint32_t* panels, const uint32_t* pairs, int rows,
                   LaneBestTwo* best) {
  const int head_dim = static_cast<int>(p.head_dim), num_pairs = head_dim / 2;
  static_assert(kTileAtoms == kPanelAtoms && kRecomputeBlock % kRowTile == 0);
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    const uint32_t* const atoms = panels + panel * num_pairs * kPanelAtoms;
    const F32 first = to_f32(add_i32(iota(), splat_i32(panel * kPanelAtoms)));
    for (int row = 0; row < rows; row += kRowTile) {
      F32 acc[kRowTile][kChunks];
      correlate_pairs(pairs + row * num_pairs, atoms, head_dim, acc);
      for (int r = 0; r < kRowTile; ++r) {
        LaneBestTwo lanes = best[row + r];
        for (int c = 0; c < kChunks; ++c) {
          lanes.update(acc[r][c], first + splat(static_cast<float>(c * kLanes)));
        }
        best[row + r] = lanes;
      }
    }
  }
}
#endif

/// Best atoms of the first `rows` rows of `residuals` [kRecomputeBlock, head_dim].
void search_all(const EncodeParams& p, const void* panels, const float* residuals, int rows,
                Best* found) {
  const int head_dim = static_cast<int>(p.head_dim), num_pairs = head_dim / 2;
  uint32_t pairs[kRecomputeBlock * kMaxHeadDim / 2];
  LaneBestTwo best[kRecomputeBlock];
  for (int row = 0; row < kRecomputeBlock; ++row) {
    round_row(residuals + row * head_dim, head_dim, pairs + row * num_pairs);
    best[row] = LaneBestTwo::none();
  }
  search_panels(p, static_cast<const uint32_t*>(panels), pairs, rows, best);
  for (int row = 0; row < rows; ++row) {
    found[row] = rescore(p, best[row], residuals + row * head_dim);
  }
}

#else

/// Best atoms of the rows of `residuals`.
void search_all(const EncodeParams& p, const void* panels, const float* residuals, int rows,
                Best* found) {
  const int head_dim = static_cast<int>(p.head_dim);
  const float* const all = static_cast<const float*>(panels);
  LaneBest best[kRecomputeBlock];
  for (int row = 0; row < rows; ++row) best[row] = LaneBest::none();
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int row = 0; row < rows; row += kRowTile) {
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        F32 acc[kRowTile][kChunks];
        correlate_tile(residuals + row * head_dim, all + panel * head_dim * kPanelAtoms + atom,
                       head_dim, acc);
        const F32 first = to_f32(add_i32(iota(), splat_i32(panel * kPanelAtoms + atom)));
        for (int r = 0; r < kRowTile && row + r < rows; ++r) {
          LaneBest lanes = best[row + r];
          for (int c = 0; c < kChunks; ++c) {
            lanes.update(acc[r][c], first + splat(static_cast<float>(c * kLanes)));
          }
          best[row + r] = lanes;
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) found[row] = reduce(best[row]);
}

#endif

void encode_with_gram(const EncodeParams& p, const EncodeTables& tables,
                      const EncodeScratch& scratch, int count) {
  const int64_t stride = padded_atoms(p.atoms);
  correlate_all(p, static_cast<const float*>(tables.panels), scratch.vectors, count,
                scratch.correlations, stride);
  for (int v = 0; v < count; ++v) {
    Pursuit& s = scratch.pursuits[v];
    const float* correlations = scratch.correlations + v * stride;
    while (!is_done(p, s)) {
      const Best best = search_gram(p, tables.gram, s, correlations);
      if (is_negligible(s, best.value)) break;
      float products[kMaxSparsity];
      const float* row = tables.gram + best.index * p.atoms;
      for (int j = 0; j < s.count; ++j) products[j] = row[s.atoms[j]];
      if (!append_atom(s, best.index, products, correlations[best.index])) break;
    }
    finish(p, s, scratch.vectors + v * p.head_dim);
  }
}

void encode_by_residuals(const EncodeParams& p, const EncodeTables& tables,
                         const EncodeScratch& scratch, int count) {
  const int head_dim = static_cast<int>(p.head_dim);
  Best best[kRecomputeBlock];
  int active[kRecomputeBlock];  // vectors that are not done, the rows of `residuals`
  int num_active = 0;
  for (int v = 0; v < count; ++v) {
    if (is_done(p, scratch.pursuits[v])) {
      finish(p, scratch.pursuits[v], scratch.vectors + v * head_dim);
      continue;
    }
    memcpy(scratch.residuals + num_active * head_dim, scratch.vectors + v * head_dim,
           head_dim * sizeof(float));
    active[num_active++] = v;
  }
  while (num_active > 0) {
    search_all(p, tables.panels, scratch.residuals, num_active, best);
    int kept = 0;
    for (int row = 0; row < num_active; ++row) {
      const int v = active[row];
      Pursuit& s = scratch.pursuits[v];
      const float* vector = scratch.vectors + v * head_dim;
      const Best found = best[row];
      bool done = is_negligible(s, found.value);
      if (!done) {
        const float* atom = p.dictionary + found.index * p.head_dim;
        float products[kMaxSparsity];
        for (int j = 0; j < s.count; ++j) {
          products[j] = dot(atom, p.dictionary + s.atoms[j] * p.head_dim, head_dim);
        }
        done = !append_atom(s, found.index, products, dot(atom, vector, head_dim)) || is_done(p, s);
      }
      if (done) {
        finish(p, s, vector);
      } else {
        compute_residual(p, s, vector, scratch.residuals + kept * head_dim);
        active[kept++] = v;
      }
    }
    num_active = kept;
  }
}

}  // namespace

void pack_dictionary_kernel(const EncodeParams& p, [[maybe_unused]] bool with_gram,
                            int64_t panel_begin, int64_t panel_end, void* panels) {
#if defined(KVCORE_ISA_AVX512_BF16)
  if (!with_gram) {
    const int head_dim = static_cast<int>(p.head_dim), num_pairs = head_dim / 2;
    for (int64_t atom = panel_begin * kPanelAtoms; atom < panel_end * kPanelAtoms; ++atom) {
      uint32_t pairs[kMaxHeadDim / 2] = {};
      if (atom < p.atoms) round_row(p.dictionary + atom * head_dim, head_dim, pairs);
      uint32_t* const out = static_cast<uint32_t*>(panels) +
                            atom / kPanelAtoms * num_pairs * kPanelAtoms + atom % kPanelAtoms;
      for (int i = 0; i < num_pairs; ++i) out[i * kPanelAtoms] = pairs[i];
    }
    return;
  }
#endif
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    float* const out = static_cast<float*>(panels) + panel * p.head_dim * kPanelAtoms;
    for (int64_t i = 0; i < p.head_dim; ++i) {
      for (int64_t a = 0; a < kPanelAtoms; ++a) {
        const int64_t atom = panel * kPanelAtoms + a;
        out[i * kPanelAtoms + a] = atom < p.atoms ? p.dictionary[atom * p.head_dim + i] : 0.0f;
      }
    }
  }
}

void gram_kernel(const EncodeParams& p, const void* panels, int64_t row_begin, int64_t row_end,
                 float* gram) {
  const int head_dim = static_cast<int>(p.head_dim);
  const float* const all = static_cast<const float*>(panels);
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int64_t row = row_begin; row < row_end; row += kRowTile) {
      // Tiles have kRowTile rows: the last one repeats a row.
      float rows[kRowTile * kMaxHeadDim];
      for (int r = 0; r < kRowTile; ++r) {
        const int64_t source = row + r < row_end ? row + r : row_end - 1;
        memcpy(rows + r * head_dim, p.dictionary + source * head_dim, head_dim * sizeof(float));
      }
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        F32 acc[kRowTile][kChunks];
        correlate_tile(rows, all + panel * head_dim * kPanelAtoms + atom, head_dim, acc);
        const int64_t first = panel * kPanelAtoms + atom;
        for (int r = 0; r < kRowTile && row + r < row_end; ++r) {
          for (int c = 0; c < kChunks; ++c) {
            float lanes[kLanes];
            store(lanes, acc[r][c]);
            const int64_t n = first + c * kLanes;
            const int64_t width = p.atoms - n < kLanes ? p.atoms - n : kLanes;
            if (width > 0) memcpy(gram + (row + r) * p.atoms + n, lanes, width * sizeof(float));
          }
        }
      }
    }
  }
}

void encode_kernel(const EncodeParams& p, const EncodeTables& tables, const EncodeScratch& scratch,
                   int64_t begin, int64_t end) {
  int count = 0;
  for (int64_t vector_idx = begin; vector_idx < end; ++vector_idx) {
    Pursuit& pursuit = scratch.pursuits[count];
    float* const vector = scratch.vectors + count * p.head_dim;
    if (load_vector(p, vector_idx, vector, pursuit)) {
      ++count;
    } else {
      finish(p, pursuit, vector);
    }
  }
  if (count == 0) return;
  if (tables.gram) {
    encode_with_gram(p, tables, scratch, count);
  } else {
    encode_by_residuals(p, tables, scratch, count);
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
