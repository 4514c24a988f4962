// One vector's orthogonal matching pursuit apart from the search for the next atom. For code that
// is compiled per ISA level.
#pragma once

#include <cmath>

#include "core/cpu/vec.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

/// True when no further atom is wanted, whatever there is to select.
inline bool is_done(const EncodeParams& p, const Pursuit& pursuit) {
  const double tolerance = p.tolerance;
  return pursuit.count == p.sparsity ||
         pursuit.energy <= tolerance * tolerance * pursuit.norm_squared;
}

/// True when what the best atom would explain is rounding.
inline bool is_negligible(const Pursuit& pursuit, double correlation) {
  return correlation * correlation <= kStopCorrelation * kStopCorrelation * pursuit.norm_squared;
}

/// Adds an atom; false, changing nothing, if it lies in the span of the others. `products` [count]
/// are those of the atom with the others, `target` its product with the vector. fp64, since the
/// recursion loses what the atoms have in common; this is a few percent of the search.
inline bool append_atom(Pursuit& s, int32_t atom, const float* products, double target) {
  const int k = s.count;
  // z = the atom's components along the orthonormalised earlier atoms.
  double z[kMaxSparsity];
  double distance = 1;
  for (int j = 0; j < k; ++j) {
    double sum = 0;
    for (int i = 0; i <= j; ++i) sum += s.inverse[j][i] * products[i];
    z[j] = sum;
    distance -= sum * sum;
  }
  if (!(distance > kMinDistanceSquared)) return false;
  const double gamma = 1 / __builtin_sqrt(distance);
  double* row = s.inverse[k];
  for (int i = 0; i < k; ++i) row[i] = 0;
  for (int j = 0; j < k; ++j) {
    for (int i = 0; i <= j; ++i) row[i] -= z[j] * s.inverse[j][i];
  }
  for (int i = 0; i < k; ++i) row[i] *= gamma;
  row[k] = gamma;
  // The vector's component along the new direction; a later atom moves the earlier coefficients.
  double component = gamma * target;
  s.atoms[k] = atom;
  s.values[k] = 0;
  for (int i = 0; i < k; ++i) component += row[i] * s.targets[i];
  s.targets[k] = target;
  for (int i = 0; i <= k; ++i) s.values[i] += component * row[i];
  s.energy -= component * component;
  s.count = k + 1;
  return true;
}

}  // namespace kvcore::lexico::KVCORE_ISA
