// What decides in fp32: the residual, and its products with the atoms that a search in integers or
// bf16 leaves. For code that is compiled per ISA level.
#pragma once

#include "core/cpu/vec.h"
#include "lexico/cpu/pursuit.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

inline float dot(const float* a, const float* b, int head_dim) {
  F32 sums[2] = {splat(0.0f), splat(0.0f)};
  for (int i = 0; i < head_dim; i += 2 * kLanes) {
    sums[0] = fma(load(a + i), load(b + i), sums[0]);
    sums[1] = fma(load(a + i + kLanes), load(b + i + kLanes), sums[1]);
  }
  return reduce_add(sums[0] + sums[1]);
}

/// residual = vector - what the selected atoms explain.
inline void compute_residual(const EncodeParams& p, const Pursuit& pursuit, const float* vector,
                             float* residual) {
  const float* atoms[kMaxSparsity];
  float values[kMaxSparsity];
  const int count = pursuit.count;
  for (int j = 0; j < count; ++j) {
    atoms[j] = p.dictionary + pursuit.atoms[j] * p.head_dim;
    values[j] = static_cast<float>(-pursuit.values[j]);
  }
  for (int i = 0; i < p.head_dim; i += 2 * kLanes) {
    F32 left[2] = {load(vector + i), load(vector + i + kLanes)};
    for (int j = 0; j < count; ++j) {
      const F32 value = splat(values[j]);
      left[0] = fma(value, load(atoms[j] + i), left[0]);
      left[1] = fma(value, load(atoms[j] + i + kLanes), left[1]);
    }
    store(residual + i, left[0]);
    store(residual + i + kLanes, left[1]);
  }
}

/// Selects the atom; false if the vector is done before it.
inline bool select_atom(const EncodeParams& p, Pursuit& s, const float* vector, int32_t atom) {
  const int head_dim = static_cast<int>(p.head_dim);
  const float* const row = p.dictionary + atom * p.head_dim;
  const float* others[kMaxSparsity + 2];
  double products[kMaxSparsity + 2] = {};
  for (int j = 0; j < s.count; ++j) others[j] = p.dictionary + s.atoms[j] * p.head_dim;
  others[s.count] = row;
  others[s.count + 1] = vector;
  dot_doubles(row, others, s.count + 2, head_dim, products);
  if (!append_atom(s, factor_stride(p.sparsity), atom, products, products[s.count + 1])) {
    return false;
  }
  // What is left after so much was subtracted is rounding of what was subtracted.
  if (s.energy < 0x1p-10 * s.norm_squared) {
    float residual[kMaxHeadDim];
    compute_residual(p, s, vector, residual);
    s.energy = 0;
    for (int i = 0; i < head_dim; ++i) s.energy += double{residual[i]} * residual[i];
  }
  return true;
}

/// The atom of the largest product with a residual, of those that were looked at; the first of
/// equal ones.
struct Best {
  float value = -1;  // magnitude
  int32_t index = 0;

  void look_at(const EncodeParams& p, const float* residual, int64_t atom) {
    if (atom >= p.atoms) return;  // padding
    const float product =
        dot(residual, p.dictionary + atom * p.head_dim, static_cast<int>(p.head_dim));
    const float magnitude = product < 0 ? -product : product;
    const bool first = magnitude == value && atom < index;
    if (magnitude > value || first) *this = {magnitude, static_cast<int32_t>(atom)};
  }
};

}  // namespace kvcore::lexico::KVCORE_ISA
