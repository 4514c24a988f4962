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

struct Magnitude {
  float amax;   // of the finite values
  bool finite;  // all values are
};

/// Applies `change` to n values in place (a multiple of 32) and takes their magnitude. Two
/// accumulators hide the latency of the arithmetic.
struct MagnitudeOfRows {
  F32 amax[2] = {splat(0), splat(0)};
  F32 poison[2] = {splat(0), splat(0)};

  template <class Change>
  void add(float* x, int n, const Change& change) {
    for (int c = 0; c < n; c += 2 * kLanes) {
      for (int i = 0; i < 2; ++i) {
        const F32 v = change(load(x + c + i * kLanes), c + i * kLanes);
        store(x + c + i * kLanes, v);
        amax[i] = max(abs(v), amax[i]);
        // v * 0 is NaN exactly for a non-finite v.
        poison[i] = fma(v, splat(0), poison[i]);
      }
    }
  }

  /// x: all n values that were added.
  Magnitude finish(const float* x, int64_t n) {
    if (reduce_add(poison[0] + poison[1]) == 0) return {reduce_max(max(amax[0], amax[1])), true};
    F32 largest = splat(0);
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 magnitude = abs(load(x + i));
      const Mask finite = less(magnitude, splat(__builtin_inff()));
      largest = max(select(finite, magnitude, splat(0)), largest);
    }
    return {reduce_max(largest), false};
  }
};

/// Tokens [token_idx, token_idx + count) of a head as stage 1 takes them: fp32, and with `mean`
/// and `balance` ([head_dim], may be null) calibrated.
inline Magnitude load_rows(const InputView& x, const float* mean, const float* balance,
                           int64_t batch_idx, int64_t head_idx, int64_t token_idx, int64_t count,
                           int head_dim, float* rows) {
  MagnitudeOfRows magnitude;
  for (int64_t t = 0; t < count; ++t) {
    float* row = rows + t * head_dim;
    widen_row(x, batch_idx, head_idx, token_idx + t, head_dim, row);
    if (mean != nullptr && balance != nullptr) {
      magnitude.add(row, head_dim,
                    [&](F32 v, int c) { return (v - load(mean + c)) / load(balance + c); });
    } else if (mean != nullptr) {
      magnitude.add(row, head_dim, [&](F32 v, int c) { return v - load(mean + c); });
    } else if (balance != nullptr) {
      magnitude.add(row, head_dim, [&](F32 v, int c) { return v / load(balance + c); });
    } else {
      magnitude.add(row, head_dim, [](F32 v, int) { return v; });
    }
  }
  return magnitude.finish(rows, count * head_dim);
}

/// Asks for the tokens of a later load_rows, so that they arrive while the present ones are
/// quantized: a page is too short for the hardware to notice the pattern in time.
inline void prefetch_rows(const InputView& x, int64_t batch_idx, int64_t head_idx,
                          int64_t token_idx, int64_t count, int head_dim) {
  if (x.channel_stride != 1) return;
  const int64_t element_bytes = x.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* rows = static_cast<const char*>(x.data);
  rows += (batch_idx * x.batch_stride + head_idx * x.head_stride) * element_bytes;
  for (int64_t t = token_idx; t < token_idx + count; ++t) {
    const char* row = rows + t * x.token_stride * element_bytes;
    for (int64_t i = 0; i < head_dim * element_bytes; i += 64) __builtin_prefetch(row + i);
  }
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
