#include <cmath>

#include "core/cpu/rows.h"
#include "lexico/cpu/coefficients.h"
#include "lexico/cpu/search_gram.h"
#include "lexico/cpu/search_residual.h"

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

/// A row of the matrix that is given, as a computed one would be.
void convert_row(const EncodeParams& p, const float* given, int16_t* row) {
  constexpr float kScale = kUnit * kUnit * 0x1p-15f;
  int64_t n = 0;
  for (; n + kLanes <= p.atoms; n += kLanes) {
    store_words(row + n, to_i32(load(given + n) * splat(kScale)));
  }
  for (; n < padded_atoms(p.atoms); n += kLanes) {
    float rest[kLanes] = {};
    for (int64_t i = n; i < p.atoms; ++i) rest[i - n] = given[i];
    store_words(row + n, to_i32(load(rest) * splat(kScale)));
  }
}

/// One step of a vector; true if it is done.
bool step_with_gram(const EncodeParams& p, const EncodeTables& tables, int16_t* converted,
                    const Upcoming& upcoming, GramSearch& search) {
  Pursuit& s = *search.pursuit;
  const int64_t padded = padded_atoms(p.atoms);
  if (s.count > 0) {
    const int last = s.count - 1;
    search.base[last] = 0;
    search.rows[last] = converted + last * padded;
    if (tables.gram) {
      search.rows[last] = tables.gram + s.atoms[last] * padded;
    } else {
      convert_row(p, p.gram + s.atoms[last] * p.atoms, converted + last * padded);
    }
    if (tables.coarse) {
      search.coarse_rows[last] = tables.coarse + s.atoms[last] * (padded / 2);
      search.scales[last] = tables.scales[s.atoms[last]];
      search.own[last] = search.correlations[s.atoms[last]];
    }
  }
  const Best best = search_gram(p, tables.panels, search, upcoming);
  if (is_negligible(s, best.value) || !select_atom(p, s, search.vector, best.index)) return true;
  return is_done(p, s);
}

/// The row that the next step of a vector reads.
Upcoming upcoming_row(const EncodeParams& p, const EncodeTables& tables, const GramSearch& search) {
  if (search.pursuit == nullptr || search.pursuit->count == 0) return {};
  const int64_t atom = search.pursuit->atoms[search.pursuit->count - 1];
  if (search.coarse) {
    const int16_t* const row = tables.coarse + atom * (padded_atoms(p.atoms) / 2);
    return {reinterpret_cast<const char*>(row), 1};
  }
  if (!tables.gram) return {reinterpret_cast<const char*>(p.gram + atom * p.atoms), sizeof(float)};
  const int16_t* const row = tables.gram + atom * padded_atoms(p.atoms);
  return {reinterpret_cast<const char*>(row), sizeof(int16_t)};
}

void encode_with_gram(const EncodeParams& p, const EncodeTables& tables,
                      const EncodeScratch& scratch, int count) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t padded = padded_atoms(p.atoms);
  int16_t words[kGramBlock * kMaxHeadDim] = {};
  float norms[kGramBlock];
  for (int v = 0; v < count; ++v) {
    const float* const vector = scratch.vectors + v * head_dim;
    norms[v] = __builtin_sqrtf(dot(vector, vector, head_dim));
    quantize_row(vector, head_dim, kUnit / norms[v], words + v * head_dim);
  }
  correlate_all<kRowTile>(p, tables.panels, words, count, scratch.correlations);
  GramSearch searches[kTurns];
  for (GramSearch& search : searches) search.pursuit = nullptr;
  int begun = 0;
  // Vectors that coarse rows were enough for, less those that they were not: where they were not
  // for the first ones, the others of a block begin without them.
  int lasted = 0;
  for (int turn = 0, left = count; left > 0; turn = (turn + 1) % kTurns) {
    GramSearch& search = searches[turn];
    if (search.pursuit == nullptr) {
      if (begun == count) continue;
      search.pursuit = scratch.pursuits + begun;
      search.vector = scratch.vectors + begun * head_dim;
      search.correlations = scratch.correlations + begun * padded;
      search.base_norm = norms[begun];
      search.found = scratch.correlations + kGramBlock * padded;
      search.coarse = tables.coarse != nullptr && lasted > -kTurns;
      ++begun;
    }
    Pursuit& s = *search.pursuit;
    const Upcoming upcoming = upcoming_row(p, tables, searches[(turn + 1) % kTurns]);
    int16_t* const converted = scratch.rows + turn * p.sparsity * padded;
    if (is_done(p, s) || step_with_gram(p, tables, converted, upcoming, search)) {
      finish(p, s, search.vector);
      lasted += search.coarse ? 1 : -1;
      search.pursuit = nullptr;
      --left;
    }
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
    search_residuals(p, tables.panels, scratch.residuals, num_active, scratch.maxima, best);
    int kept = 0;
    for (int row = 0; row < num_active; ++row) {
      const int v = active[row];
      Pursuit& s = scratch.pursuits[v];
      const float* vector = scratch.vectors + v * head_dim;
      const Best found = best[row];
      if (is_negligible(s, found.value) || !select_atom(p, s, vector, found.index) ||
          is_done(p, s)) {
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

void encode_kernel(const EncodeParams& p, const EncodeTables& tables, const EncodeScratch& scratch,
                   bool with_gram, int64_t begin, int64_t end) {
  const int64_t factor = p.sparsity * factor_stride(p.sparsity);
  int count = 0;
  for (int64_t vector_idx = begin; vector_idx < end; ++vector_idx) {
    Pursuit& pursuit = scratch.pursuits[count];
    pursuit.inverse = scratch.factors + 2 * count * factor;
    pursuit.transposed = pursuit.inverse + factor;
    float* const vector = scratch.vectors + count * p.head_dim;
    if (load_vector(p, vector_idx, vector, pursuit)) {
      ++count;
    } else {
      finish(p, pursuit, vector);
    }
  }
  if (count == 0) return;
  if (with_gram) {
    encode_with_gram(p, tables, scratch, count);
  } else {
    encode_by_residuals(p, tables, scratch, count);
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
