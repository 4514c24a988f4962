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
inline void store_doubles(double* p, F64 x) { memcpy(p, &x, sizeof x); }
#if defined(KVCORE_VEC_512)
inline F64 widen_floats(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline F64 fma_doubles(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(KVCORE_VEC_256)
inline F64 widen_floats(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline F64 fma_doubles(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
#else
inline F64 widen_floats(const float* p) { return F64{p[0], p[1]}; }
inline F64 fma_doubles(F64 a, F64 b, F64 c) { return a * b + c; }
#endif
inline double reduce_doubles(F64 x) {
  double lanes[kDoubles];
  store_doubles(lanes, x);
  for (int n = kDoubles / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

/// Products of a row and kRows others.
template <int kRows>
inline void dot_rows(const float* row, const float* const* others, int head_dim, double* products) {
  F64 sums[kRows] = {};
  for (int i = 0; i < head_dim; i += kDoubles) {
    const F64 x = widen_floats(row + i);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = fma_doubles(x, widen_floats(others[r] + i), sums[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) products[r] = reduce_doubles(sums[r]);
}

/// products [count] of a row and others. In fp64, where products of fp32 are exact: a coefficient
/// next to where its code changes is on the side that exact ones are on.
inline void dot_doubles(const float* row, const float* const* others, int count, int head_dim,
                        double* products) {
  int j = 0;
  for (; j + 4 <= count; j += 4) dot_rows<4>(row, others + j, head_dim, products + j);
  if (j + 2 <= count) {
    dot_rows<2>(row, others + j, head_dim, products + j);
    j += 2;
  }
  if (j < count) dot_rows<1>(row, others + j, head_dim, products + j);
}

/// kDoubles sums over [begin, end) of factors[i] times row i of a matrix; four at a time, each of
/// which would wait for the one before it.
inline F64 sum_rows(const double* matrix, int64_t stride, const double* factors, int begin,
                    int end) {
  F64 sums[4] = {};
  int i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int n = 0; n < 4; ++n) {
      sums[n] =
          fma_doubles(load_doubles(matrix + (i + n) * stride), F64{} + factors[i + n], sums[n]);
    }
  }
  for (; i < end; ++i)
    sums[0] = fma_doubles(load_doubles(matrix + i * stride), F64{} + factors[i], sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/// Adds an atom; false, changing nothing, if it lies in the span of the others. `products`
/// [count + 1] are those of the atom with the others and with itself, `target` its product with the
/// vector. fp64, since the recursion loses what the atoms have in common.
inline bool append_atom(Pursuit& s, int64_t stride, int32_t atom, const double* products,
                        double target) {
  const int k = s.count;
  // z = the atom's components along the orthonormalised earlier atoms; zeros behind them.
  double z[kMaxSparsity];
  F64 squares = {};
  for (int j = 0; j < k; j += kDoubles) {
    const int end = k < j + kDoubles ? k : j + kDoubles;
    const F64 sum = sum_rows(s.transposed + j, stride, products, 0, end);
    store_doubles(z + j, sum);
    squares += sum * sum;
  }
  const double distance = products[k] - reduce_doubles(squares);
  if (!(distance > kMinDistanceSquared)) return false;
  const double gamma = 1 / __builtin_sqrt(distance);
  double *const row = s.inverse + k * stride, *const column = s.transposed + k * stride;
  for (int i = 0; i < stride; ++i) row[i] = column[i] = 0;
  if (k % kDoubles == 0) {
    // Sums are over all lanes of a vector.
    store_doubles(s.targets + k, F64{});
    store_doubles(s.values + k, F64{});
  }
  s.targets[k] = target;
  for (int i = 0; i < k; i += kDoubles) {
    store_doubles(row + i, -gamma * sum_rows(s.inverse + i, stride, z, i, k));
  }
  row[k] = gamma;
  for (int i = 0; i <= k; ++i) s.transposed[i * stride + k] = row[i];
  // The vector's component along the new direction; a later atom moves the earlier coefficients.
  F64 components = {};
  for (int i = 0; i <= k; i += kDoubles) {
    components += load_doubles(row + i) * load_doubles(s.targets + i);
  }
  const double component = reduce_doubles(components);
  for (int i = 0; i <= k; i += kDoubles) {
    store_doubles(s.values + i, load_doubles(s.values + i) + component * load_doubles(row + i));
  }
  s.atoms[k] = atom;
  s.energy -= component * component;
  s.count = k + 1;
  return true;
}

}  // namespace kvcore::lexico::KVCORE_ISA
