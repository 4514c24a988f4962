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

/// Rows [0, kProductMultiple) of columns [c, c + kLanes) of X, in place: forward substitution with
/// the rows' own block of -L.
[[gnu::flatten]] inline void substitute(const float* minus_l, float* x) {
  constexpr int kRows = kProductMultiple;
  F32 row[kRows];
  unroll<kRows>([&](int i) { row[i] = load(x + i * kSquareStride); });
  unroll<kRows>([&](int j) {
    unroll<kRows>([&](int i) {
      if (i > j) row[i] = fma(splat(minus_l[i * kSquareStride + j]), row[j], row[i]);
    });
  });
  unroll<kRows>([&](int i) { store(x + i * kSquareStride, row[i]); });
}

/// X = (I + L)^-1 with L_ij = beta_i kf_i kf_j kk_ij below the diagonal, by blocks of rows: what
/// the rows above add to a block are products. minus_l: working memory.
inline void invert(const TokenValues& t, int rows, const float* kk, float* minus_l, float* x) {
  constexpr int kBlock = kProductMultiple;
  for (int begin = 0; begin < rows; begin += kBlock) {
    float* const l = minus_l + begin * kSquareStride;
    float* const block = x + begin * kSquareStride;
    for (int i = 0; i < kBlock; ++i) {
      const int at = (begin + i) * kSquareStride;
      const F32 own = splat(-(t.beta[begin + i] * t.k_factor[begin + i]));
      for (int j = 0; j < begin + kBlock; j += kLanes) {
        store(minus_l + at + j, load(kk + at + j) * own * load(t.k_factor + j));
      }
      zero_row(x + at + begin, kBlock);
      x[at + begin + i] = 1.0f;
    }
    for (int c = 0; c < begin; c += kBlock) {  // rows above c have nothing in these columns
      product<Fp32Operand, kSquareStride, 1>(l + c, x + c * kSquareStride + c, kSquareStride,
                                             block + c, kSquareStride, kBlock, kBlock, begin - c);
    }
    for (int c = 0; c < begin + kBlock; c += kLanes) substitute(l + begin, block + c);
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
