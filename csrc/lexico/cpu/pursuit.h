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

// Doubles of one vector. Sums keep their order at every level: each lane is a sum of its own.
constexpr int kDoubles = kLanes / 2;
typedef double F64 __attribute__((vector_size(4 * kLanes)));
inline F64 load_doubles(const double* p) {
  F64 x;
  memcpy(&x, p, sizeof x);
  return x;
}

/// In fp64, where products of fp32 are exact: a coefficient next to where its code changes is on
/// the side that exact ones are on.
inline double dot_doubles(const float* a, const float* b, int head_dim) {
  typedef float Floats __attribute__((vector_size(2 * kLanes)));
  F64 sums[2] = {};
  for (int i = 0; i < head_dim; i += 2 * kDoubles) {
    for (int half = 0; half < 2; ++half) {
      Floats x, y;
      memcpy(&x, a + i + half * kDoubles, sizeof x);
      memcpy(&y, b + i + half * kDoubles, sizeof y);
      sums[half] += __builtin_convertvector(x, F64) * __builtin_convertvector(y, F64);
    }
  }
  sums[0] += sums[1];
  double total = 0;
  for (int i = 0; i < kDoubles; ++i) total += sums[0][i];
  return total;
}

/// Adds an atom; false, changing nothing, if it lies in the span of the others. `products` [count]
/// are those of the atom with the others, `target` its product with the vector. fp64, since the
/// recursion loses what the atoms have in common.
inline bool append_atom(Pursuit& s, int64_t stride, int32_t atom, const double* products,
                        double target) {
  const int k = s.count;
  // z = the atom's components along the orthonormalised earlier atoms.
  double z[kMaxSparsity];
  for (int j = 0; j < k; j += kDoubles) {
    F64 sum = {};
    const int end = k < j + kDoubles ? k : j + kDoubles;
    for (int i = 0; i < end; ++i) {
      sum += load_doubles(s.transposed + i * stride + j) * products[i];
    }
    memcpy(z + j, &sum, sizeof sum);
  }
  double distance = 1;
  for (int j = 0; j < k; ++j) distance -= z[j] * z[j];
  if (!(distance > kMinDistanceSquared)) return false;
  const double gamma = 1 / __builtin_sqrt(distance);
  double *const row = s.inverse + k * stride, *const column = s.transposed + k * stride;
  for (int i = 0; i < stride; ++i) row[i] = column[i] = 0;
  for (int i = 0; i < k; i += kDoubles) {
    F64 sum = {};
    for (int j = i; j < k; ++j) sum -= load_doubles(s.inverse + j * stride + i) * z[j];
    sum *= gamma;
    memcpy(row + i, &sum, sizeof sum);
  }
  row[k] = gamma;
  for (int i = 0; i <= k; ++i) s.transposed[i * stride + k] = row[i];
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
