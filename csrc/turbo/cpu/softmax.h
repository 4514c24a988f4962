// The softmax of one page for a few rows: S8 to P8, and the update of m and l. Per ISA level.
#pragma once

#include "core/cpu/vec.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

/// SAS(x), x <= 0: 2^-n * poly(f) with -x log2(e) = n + f; 0 below the threshold.
inline F32 sas(F32 x, F32 threshold) {
  const F32 y = x * splat(1.44269504f);
  const F32 n = ceil(y);
  const F32 f = n - y;
  F32 p = fma(splat(-0.039616f), f, splat(0.231159f));
  p = fma(p, f, splat(-0.691588f));
  p = fma(p, f, splat(1.0f));
  return select(less(x, threshold), splat(0.0f), scale_pow2(p, n));
}

/// Rows [row, row + kRows) of a tile. s holds S8 and is overwritten.
/// s: [kRows, 64]; p8, decay, weight: [kRows, 64], [kRows], [kRows], what page_values takes.
/// Returns false if every P is zero: then the page changes nothing.
template <bool kExact>
inline bool page_softmax(RowTile& tile, int row, int num_rows, const Page& page, float k_scale,
                         float v_scale, float threshold, int32_t* s, uint8_t* p8, float* decay,
                         float* weight) {
  constexpr int kVecs = kPageTokens / kLanes;
  bool any_p = false;
  for (int r = 0; r < num_rows; ++r) {
    const F32 factor = splat(tile.q_scale[row + r] * k_scale);
    const int64_t first = tile.first_key[row + r] - page.first_key;
    const int64_t end = tile.end_key[row + r] - page.first_key;
    F32 x[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      x[i] = to_f32(load_i32(s + r * kPageTokens + i * kLanes)) * factor;
    }
    if (first > 0 || end < kPageTokens) {
      const I32 lower =
          splat_i32(first < 0 ? -1 : static_cast<int32_t>(first < 64 ? first : 64) - 1);
      const I32 upper = splat_i32(end < 0 ? 0 : static_cast<int32_t>(end < 64 ? end : 64));
      for (int i = 0; i < kVecs; ++i) {
        const I32 token = add_i32(iota(), splat_i32(i * kLanes));
        x[i] = select(less(token, upper), x[i], splat(-__builtin_inff()));
        x[i] = select(less(lower, token), x[i], splat(-__builtin_inff()));
      }
    }
    F32 top = x[0];
    for (int i = 1; i < kVecs; ++i) top = max(top, x[i]);
    const float old_m = tile.m[row + r];
    const float page_m = reduce_max(top);
    const float m = page_m > old_m ? page_m : old_m;
    // A row that has seen no key keeps -inf, and -inf - -inf would poison it with NaN.
    const float base = m == -__builtin_inff() ? 0.0f : m;
    tile.m[row + r] = m;
    decay[r] = old_m == m ? 1.0f : exp_nonpositive(old_m - base);

    F32 sum = splat(0.0f), p_max = splat(0.0f);
    for (int i = 0; i < kVecs; ++i) {
      const F32 below = x[i] - splat(base);
      x[i] = kExact ? exp_nonpositive(below) : sas(below, splat(threshold));
      sum = sum + x[i];
      p_max = max(p_max, x[i]);
    }
    float* lanes = tile.l + (row + r) * kMaxLanes;
    store(lanes, fma(splat(decay[r]), load(lanes), sum));
    const float largest = reduce_max(p_max);
    weight[r] = largest / kCodeMax * v_scale;
    any_p |= !(largest == 0.0f);
    const F32 to_code = splat(largest > 0.0f ? kCodeMax / largest : 0.0f);
    for (int i = 0; i < kVecs; ++i) {
      store_low_bytes(p8 + r * kPageTokens + i * kLanes, to_i32(x[i] * to_code));
    }
  }
  return any_p;
}

}  // namespace kvcore::turbo::KVCORE_ISA
