// The search with the Gram matrix G: c = c_0 - sum_j y_j G[n_j] over the selected atoms, all in
// 16-bit integers. For code that is compiled per ISA level.
//
// c_0 are the products of a base, at first the vector itself, whose norm is 2^14 less a little in
// units of c. The rounding of c_0, y, G and of each product has a bound; of the atoms within it of
// the largest |c| the products with the residual are computed in fp32, and decide. The bound is of
// the base's size: once the residual is so small that it tells little apart, c_0 is computed anew,
// of the residual, and the y_j are what the coefficients have changed since.
//
// Rows of a computed matrix may be read in bytes (coarse_row.h), until these leave too many atoms
// within the bound.
#pragma once

#include "lexico/cpu/coarse_row.h"
#include "lexico/cpu/correlate.h"

namespace kvcore::lexico::KVCORE_ISA {

/// What is being searched for one vector, beside its Pursuit.
struct GramSearch {
  Pursuit* pursuit;  // null when there is none
  const float* vector;
  int16_t* correlations;              // [padded_atoms], c_0
  const int16_t* rows[kMaxSparsity];  // of G, those of the selected atoms
  int16_t* found;                     // [padded_atoms], c
  double base[kMaxSparsity];          // coefficients that c_0 accounts for
  float base_norm;
  // Coarse rows are read. They are cut off at their own atoms, and there c_0 is changed instead.
  bool coarse;
  const int16_t* coarse_rows[kMaxSparsity];
  CoarseScale scales[kMaxSparsity];
  int16_t own[kMaxSparsity];  // c_0 of the selected atoms
};

/// A row that will be read soon, `stride` bytes an atom.
struct Upcoming {
  const char* row = nullptr;
  int stride = 0;
};

/// Rows of G times coefficients.
struct Explained {
  int count = 0;
  const int16_t* rows[kMaxSparsity];
  int32_t values[kMaxSparsity];  // the same word twice
  int32_t sum = 0;               // of magnitudes
  float products = 0;            // of the coefficients of G, the magnitudes
  int roundings = 0;             // coefficients that are not 0

  /// False if the coefficient does not fit.
  bool add(const int16_t* row, double value, double factor) {
    constexpr double kLargest = 32767;
    products += static_cast<float>(__builtin_fabs(value));
    roundings += value != 0;
    value /= factor;
    if (!(__builtin_fabs(value) < kLargest)) return false;
    const int32_t word = static_cast<int32_t>(__builtin_lrint(value));
    if (word == 0) return true;
    rows[count] = row;
    values[count++] = (word & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(word) << 16);
    sum += word < 0 ? -word : word;
    return true;
  }
};

/// kVectors vectors of c, from atom n; meanwhile `lines` of what is upcoming are fetched.
template <int kVectors, bool kFromBytes>
[[gnu::flatten]] inline void explain(const int16_t* correlations, const Explained& explained,
                                     int64_t n, const char* upcoming, int lines,
                                     Bytes (&out)[kVectors]) {
  Bytes c[kVectors];
  unroll<kVectors>([&](int i) { c[i] = load_bytes(correlations + n + i * kWords); });
  int line = 0;
  for (int j = 0; j < explained.count; ++j) {
    const Bytes value = (Bytes)splat_i32(explained.values[j]);
    const int16_t* const row = explained.rows[j];
    if constexpr (kFromBytes) {
      unroll<kVectors / 2>([&](int i) {
        const Products products = load_coarse(row, n + i * kPairAtoms);
        c[2 * i] = sub_words(c[2 * i], mul_high_words(value, products.low));
        c[2 * i + 1] = sub_words(c[2 * i + 1], mul_high_words(value, products.high));
      });
    } else {
      unroll<kVectors>([&](int i) {
        c[i] = sub_words(c[i], mul_high_words(value, load_bytes(row + n + i * kWords)));
      });
    }
    // One at a time: a burst of misses would hold up the loads of the rows.
    if (line < lines) __builtin_prefetch(upcoming + 64 * line++);
  }
  for (; line < lines; ++line) __builtin_prefetch(upcoming + 64 * line);
  unroll<kVectors>([&](int i) { out[i] = c[i]; });
}

// The largest magnitudes are kept for groups of so many atoms.
constexpr int kGroup = 4 * kWords;
static_assert(kAtomAlignment % kGroup == 0);

/// Largest |c| of all atoms, which are stored in `found`; maxima [padded_atoms / kGroup] are those
/// of the groups, by lane.
template <bool kFromBytes>
[[gnu::flatten]] inline int largest_correlation(const int16_t* correlations,
                                                const Explained& explained, int64_t padded,
                                                const Upcoming& upcoming, int16_t* found,
                                                Bytes* maxima) {
  // As many at a time as lie in 8 lines of a row.
  constexpr int kGroups = kFromBytes && kVectorRegisters == 32 ? 4 : 2;
  Bytes largest = splat_word(0);
  const auto keep = [&](const Bytes* c, int64_t n) {
    unroll<4>([&](int i) { store_bytes(found + n + i * kWords, c[i]); });
    const Bytes first = max_words(abs_words(c[0]), abs_words(c[1]));
    const Bytes second = max_words(abs_words(c[2]), abs_words(c[3]));
    const Bytes group = max_words(first, second);
    maxima[n / kGroup] = group;
    largest = max_words(largest, group);
  };
  int64_t n = 0;
  for (; n + kGroups * kGroup <= padded; n += kGroups * kGroup) {
    Bytes c[4 * kGroups];
    explain<4 * kGroups, kFromBytes>(correlations, explained, n, upcoming.row + n * upcoming.stride,
                                     kGroups * kGroup * upcoming.stride / 64, c);
    unroll<kGroups>([&](int g) { keep(c + 4 * g, n + g * kGroup); });
  }
  for (; n < padded; n += kGroup) {
    Bytes c[4];
    explain<4, kFromBytes>(correlations, explained, n, nullptr, 0, c);
    keep(c, n);
  }
  int16_t lanes[kWords];
  store_bytes(lanes, largest);
  int result = 0;
  for (int i = 0; i < kWords; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

/// What the base does not account for, of rows in bytes or of whole ones; false if a coefficient
/// does not fit.
template <bool kFromBytes>
inline bool explain_changes(GramSearch& s, Explained& explained) {
  const Pursuit& pursuit = *s.pursuit;
  explained = {};
  for (int j = 0; j < pursuit.count; ++j) {
    // c is d . r kUnit^2 / (2^16 base_norm), and a product of words is one over 2^15.
    const double value = (pursuit.values[j] - s.base[j]) * 0x1p14 / s.base_norm;
    if constexpr (!kFromBytes) {
      if (!explained.add(s.rows[j], value, 1)) return false;
      continue;
    }
    const CoarseScale& scale = s.scales[j];
    const int before = explained.count;
    if (!explained.add(s.coarse_rows[j], value, scale.factor)) return false;
    const int word = explained.count > before ? static_cast<int16_t>(explained.values[before]) : 0;
    const int subtracted = (word * scale.stored + (1 << 14)) >> 15;
    const int wanted = static_cast<int>(__builtin_lrint(value * scale.diagonal * 0x1p-15));
    s.correlations[pursuit.atoms[j]] = static_cast<int16_t>(s.own[j] - wanted + subtracted);
  }
  return true;
}

/// The most that c is off, by integers.
inline float rounding_of_search(const GramSearch& s, const Explained& explained, int head_dim) {
  const float channels = rounding_of_channels(head_dim);
  // c_0's rounding and its factors'; of each coefficient the product's rounding and its own times
  // |G| <= 1; of G, which the coefficient multiplies, the rounding and an atom's; a coarse row's
  // own, and that of what it is multiplied by.
  return 0.5f + kUnit * channels + static_cast<float>(explained.roundings) +
         explained.products * (0x1p-16f + channels) +
         (s.coarse ? static_cast<float>(explained.sum) * ((kCoarse + 1) * 0x1p-15f) : 0);
}

/// From now on whole rows are read.
inline void leave_coarse(GramSearch& s) {
  for (int j = 0; j < s.pursuit->count; ++j) s.correlations[s.pursuit->atoms[j]] = s.own[j];
  s.coarse = false;
}

/// c_0 of `rows` <= kRows vectors of the norm kUnit, [kRows, head_dim].
template <int kRows>
inline void correlate_all(const EncodeParams& p, const int16_t* panels, const int16_t* words,
                          int rows, int16_t* correlations) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t padded = padded_atoms(p.atoms);
  const I32 half = splat_i32(1 << 15);
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int row = 0; row < rows; row += kRows) {
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        I32 acc[kRows][kChunks];
        correlate_tile<kRows>(words + row * head_dim, head_dim, 2,
                              panels + panel * head_dim * kPanelAtoms + 2 * atom, head_dim / 2,
                              acc);
        int16_t* const out = correlations + row * padded + panel * kPanelAtoms + atom;
        for (int r = 0; r < kRows && row + r < rows; ++r) {
          for (int c = 0; c < kChunks; ++c) {
            store_words(out + r * padded + c * kLanes, (acc[r][c] + half) >> 16);
          }
        }
      }
    }
  }
}

/// The base becomes the residual, of norm `norm`.
inline void renew_base(const EncodeParams& p, const int16_t* panels, const float* residual,
                       float norm, GramSearch& s) {
  const int head_dim = static_cast<int>(p.head_dim);
  int16_t words[kMaxHeadDim];
  quantize_row(residual, head_dim, kUnit / norm, words);
  correlate_all<1>(p, panels, words, 1, s.correlations);
  memcpy(s.base, s.pursuit->values, s.pursuit->count * sizeof(double));
  for (int j = 0; j < s.pursuit->count; ++j) s.own[j] = s.correlations[s.pursuit->atoms[j]];
  s.base_norm = norm;
}

/// Atoms that the most correlated one is among.
struct Candidates {
  static constexpr int kListed = 32;
  int count = 0;  // may be more than are listed
  int32_t atoms[kListed];

  void add(int64_t atom) {
    if (count < kListed) atoms[count] = static_cast<int32_t>(atom);
    ++count;
  }
};

/// Calls f(atom) for those whose |c| is above `below`, until it returns false.
template <class F>
inline void for_largest(const int16_t* found, int64_t padded, const Bytes* maxima, int below,
                        const F& f) {
  const Bytes bound = splat_word(below);
  for (int64_t n = 0; n < padded; n += kGroup) {
    const Bytes* const group = maxima + n / kGroup;
    if (n % (4 * kGroup) == 0 && n + 4 * kGroup <= padded &&
        !less_words(bound,
                    max_words(max_words(group[0], group[1]), max_words(group[2], group[3])))) {
      n += 3 * kGroup;
      continue;
    }
    if (!less_words(bound, *group)) continue;
    for (int64_t i = n; i < n + kGroup; i += kWords) {
      for (uint32_t bits = less_words(bound, abs_words(load_bytes(found + i))); bits;) {
        const int word = __builtin_ctz(bits) / kWordBits;
        if (!f(i + word)) return;
        bits &= ~(((1u << kWordBits) - 1) << word * kWordBits);
      }
    }
  }
}

/// The atom most correlated with the residual, and its product with it, or a lower bound of that
/// which is not negligible.
inline Best search_gram(const EncodeParams& p, const int16_t* panels, GramSearch& s,
                        Upcoming upcoming) {
  const Pursuit& pursuit = *s.pursuit;
  const int head_dim = static_cast<int>(p.head_dim), count = pursuit.count;
  const int64_t padded = padded_atoms(p.atoms);
  double magnitudes = __builtin_sqrt(pursuit.norm_squared);
  for (int j = 0; j < count; ++j) magnitudes += __builtin_fabs(pursuit.values[j]);
  const float floats = static_cast<float>(magnitudes) * float_error(count);

  Bytes maxima[kMaxAtoms / kGroup];
  float residual[kMaxHeadDim];
  Explained explained;
  Candidates candidates;
  int largest = 0, bound = 0, below = 0;
  bool fresh = count == 0;  // the base is the residual
  while (true) {
    if (s.coarse ? explain_changes<true>(s, explained) : explain_changes<false>(s, explained)) {
      auto* const search = s.coarse ? largest_correlation<true> : largest_correlation<false>;
      largest = search(s.correlations, explained, padded, upcoming, s.found, maxima);
      upcoming = {};
      // What fp32 adds, and one for the sum's own.
      const float off = rounding_of_search(s, explained, head_dim) + 0x1p14f * floats / s.base_norm;
      bound = off < 16383 ? static_cast<int>(off) + 2 : 16384;
      below = largest - 2 * bound > 0 ? largest - 2 * bound - 1 : -1;
      candidates.count = 0;
      for_largest(s.found, padded, maxima, below, [&](int64_t atom) {
        candidates.add(atom);
        return candidates.count <= Candidates::kListed;
      });
      if (s.coarse) {
        // On random atoms there are half as many at the last step; with more, whole rows are
        // cheaper.
        if (candidates.count <= p.sparsity) break;
        leave_coarse(s);
        continue;
      }
      // As long as few atoms lie within the bound, they are cheaper than the base.
      if (fresh || 8 * bound <= largest) break;
    }
    compute_residual(p, pursuit, s.vector, residual);
    const float norm = __builtin_sqrtf(dot(residual, residual, head_dim));
    if (norm == 0) return {0, 0};
    renew_base(p, panels, residual, norm, s);
    fresh = true;
  }

  // The atoms' rows come from memory while the residual is computed, or the atom is selected.
  for (int i = 0; i < candidates.count && i < Candidates::kListed; ++i) {
    const float* const row = p.dictionary + candidates.atoms[i] * p.head_dim;
    for (int n = 0; n < head_dim; n += 16) __builtin_prefetch(row + n);
  }
  if (candidates.count == 1) {
    // Nothing is left to decide but whether the product is too small to go on: mostly it is not.
    const float least = static_cast<float>(largest - bound) * 0x1p-14f * s.base_norm;
    if (!is_negligible(pursuit, least)) return {least, candidates.atoms[0]};
  }
  compute_residual(p, pursuit, s.vector, residual);
  Best best;
  if (candidates.count <= Candidates::kListed) {
    for (int i = 0; i < candidates.count; ++i) best.look_at(p, residual, candidates.atoms[i]);
  } else {
    for_largest(s.found, padded, maxima, below, [&](int64_t atom) {
      best.look_at(p, residual, atom);
      return true;
    });
  }
  return best;
}

}  // namespace kvcore::lexico::KVCORE_ISA
