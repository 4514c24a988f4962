// Stage 1: fp32 rows of a page to int8 codes with one scale. For code that is compiled per ISA
// level; a row is the head_dim channels of one token.
#pragma once

#include "core/cpu/rows.h"
#include "core/cpu/vec.h"
#include "turbo/layout.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

/// The smallest normal number: an all-zero page needs no special case.
constexpr float kMinScale = 0x1p-126f;

/// Tokens [token_idx, token_idx + count) of a head as stage 1 takes them: fp32, and with `mean`
/// and `balance` ([head_dim], may be null) calibrated.
inline void load_rows(const InputView& x, const float* mean, const float* balance,
                      int64_t batch_idx, int64_t head_idx, int64_t token_idx, int64_t count,
                      int head_dim, float* rows) {
  for (int64_t t = 0; t < count; ++t) {
    float* row = rows + t * head_dim;
    widen_row(x, batch_idx, head_idx, token_idx + t, head_dim, row);
    if (mean != nullptr) {
      for (int c = 0; c < head_dim; c += kLanes) store(row + c, load(row + c) - load(mean + c));
    }
    if (balance != nullptr) {
      for (int c = 0; c < head_dim; c += kLanes) store(row + c, load(row + c) / load(balance + c));
    }
  }
}

struct Magnitude {
  float amax;   // of the finite values
  bool finite;  // all values are
};

/// n is a multiple of 32.
inline Magnitude measure(const float* x, int64_t n) {
  // x * 0 is NaN exactly for a non-finite x.
  F32 amax = splat(0), poison = splat(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i);
    amax = max(abs(v), amax);
    poison = fma(v, splat(0), poison);
  }
  if (reduce_add(poison) == 0) return {reduce_max(amax), true};
  amax = splat(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 magnitude = abs(load(x + i));
    amax = max(select(less(magnitude, splat(__builtin_inff())), magnitude, splat(0)), amax);
  }
  return {reduce_max(amax), false};
}

/// The scale that maps amax to the largest code.
inline float code_scale(float amax) {
  const float scale = amax / kCodeMax;
  return scale > kMinScale ? scale : kMinScale;
}

/// rint(x / scale) of n finite values, |x / scale| <= kCodeMax up to rounding.
inline void quantize_row(const float* x, int n, float scale, int8_t* codes) {
  // A product with the reciprocal is within 3 * 119 * 2^-24 of the rounded quotient. Unless it is
  // that close to a tie both round to the same integer, and only a row with such a value, one in
  // hundreds, pays for its divisions.
  const F32 reciprocal = splat(1 / scale);
  F32 farthest = splat(0);
  for (int c = 0; c < n; c += kLanes) {
    const F32 y = load(x + c) * reciprocal;
    farthest = max(abs(y - round_even(y)), farthest);
    store_low_bytes(codes + c, to_i32(y));
  }
  if (reduce_max(farthest) < 0.5f - 0x1p-15f) return;
  for (int c = 0; c < n; c += kLanes) {
    store_low_bytes(codes + c, to_i32(load(x + c) / splat(scale)));
  }
}

/// Codes of `count` tokens that share a scale of their own, which is returned: NaN with codes 0 if
/// a value is not finite.
inline float quantize_rows(const float* rows, Magnitude magnitude, int64_t count, int head_dim,
                           int8_t* codes) {
  if (!magnitude.finite) {
    memset(codes, 0, count * head_dim);
    return __builtin_nanf("");
  }
  const float scale = code_scale(magnitude.amax);
  for (int64_t t = 0; t < count; ++t) {
    quantize_row(rows + t * head_dim, head_dim, scale, codes + t * head_dim);
  }
  return scale;
}

}  // namespace kvcore::turbo::KVCORE_ISA
