// The triangular system of a chunk. For code that is compiled per ISA level.
#pragma once

#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {

/// Columns of row i of a triangular square that are always defined: whole groups of 16 up to i.
inline int filled_columns(int i) {
  return i / kProductMultiple * kProductMultiple + kProductMultiple;
}

/// Where columns [j, j + kLanes) are at most `last`.
inline Mask up_to(int j, int last) {
  return less(add_i32(iota(), splat_i32(j)), splat_i32(last + 1));
}

/// X = (I + L)^-1 with L_ij = beta_i kf_i kf_j kk_ij below the diagonal, by rows. L: working
/// memory.
inline void invert(const TokenValues& t, int rows, const float* kk, float* L, float* x) {
  for (int i = 0; i < rows; ++i) {
    float* const l = L + i * kSquareStride;
    float* const row = x + i * kSquareStride;
    const F32 own = splat(t.beta[i] * t.k_factor[i]);
    for (int j = 0; j < i; j += kLanes) {
      store(l + j, load(kk + i * kSquareStride + j) * own * load(t.k_factor + j));
    }
    for (int c = 0; c < filled_columns(i); c += kLanes) {
      F32 even = splat(0.0f), odd = splat(0.0f);
      int j = c;  // rows above c have nothing in these columns
      for (; j + 1 < i; j += 2) {
        even = fma(splat(l[j]), load(x + j * kSquareStride + c), even);
        odd = fma(splat(l[j + 1]), load(x + (j + 1) * kSquareStride + c), odd);
      }
      if (j < i) even = fma(splat(l[j]), load(x + j * kSquareStride + c), even);
      store(row + c, splat(0.0f) - (even + odd));
    }
    row[i] = 1.0f;
  }
}

/// A = (X * D) diag(beta) and P = (q k^T) * D with the factors of q and k.
inline void weigh(const TokenValues& t, int rows, const float* x, const float* qk, float* a,
                  float* p) {
  const F32 zero = splat(0.0f);
  for (int i = 0; i < rows; ++i) {
    const F32 own = splat(t.G[i]), factor = splat(t.q_factor[i]);
    for (int j = 0; j < filled_columns(i); j += kLanes) {
      const int at = i * kSquareStride + j;
      const Mask past = up_to(j, i);
      // Masked before the exponential, whose argument may be positive elsewhere.
      const F32 decay = exp_any(select(past, own - load(t.G + j), zero));
      store(a + at, select(past, load(x + at) * decay * load(t.beta + j), zero));
      const F32 score = load(qk + at) * factor * load(t.k_factor + j);
      store(p + at, select(past, score * decay, zero));
    }
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
