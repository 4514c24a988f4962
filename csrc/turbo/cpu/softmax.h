// The softmax of one page for a few rows: S8 to P8, and the update of m and l. Per ISA level.
#pragma once

#include <type_traits>

#include "core/cpu/dot.h"
#include "core/cpu/lanes.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

/// SAS(x), x <= 0: 2^-n * poly(f) with -x log2(e) = n + f; 0 below the threshold.
inline F32 sas(F32 x, F32 threshold) {
  constexpr float kLog2E = 1.44269504f;
  const F32 n_biased = ceil_biased(x * splat(kLog2E));
  const F32 f = fma(x, splat(-kLog2E), n_biased - splat(kBias));
  F32 p = fma(splat(-0.039616f), f, splat(0.231159f));
  p = fma(p, f, splat(-0.691588f));
  p = fma(p, f, splat(1.0f));
  return select(less(x, threshold), splat(0.0f), scale_pow2_biased(p, n_biased));
}

/// What a page does to kRows rows. Arrays over rows are written four at a time.
template <int kRows>
struct PageUpdate {
  static constexpr int kPadded = (kRows + 3) / 4 * 4;
  alignas(64) int32_t s[kRows * kPageTokens];   // S8
  alignas(64) uint8_t p8[kRows * kPageTokens];  // P8
  float p_sum[kPadded];                         // sum of P8
  float decay[kPadded];                         // of O and l
  float weight[kPadded];                        // O gets weight * (P8 . V8)
};

/// -inf for the tokens of a page that a row does not see.
template <int kVecs>
inline void mask_scores(int64_t first, int64_t end, F32 (&x)[kVecs]) {
  const I32 lower = splat_i32(first < 0 ? -1 : static_cast<int32_t>(first < 64 ? first : 64) - 1);
  const I32 upper = splat_i32(end < 0 ? 0 : static_cast<int32_t>(end < 64 ? end : 64));
  for (int i = 0; i < kVecs; ++i) {
    const I32 token = add_i32(iota(), splat_i32(i * kLanes));
    x[i] = select(less(token, upper), x[i], splat(-__builtin_inff()));
    x[i] = select(less(lower, token), x[i], splat(-__builtin_inff()));
  }
}

/// Rows [row, row + kCount) of a tile, from S8 to everything else of an update, kCount <= 4. Each
/// step goes over all rows before the next, so that their latencies overlap. What one row needs of
/// a vector over rows is stored and read back: that forwards, which a vector of stored scalars
/// would not. s, p8: [kCount, 64]; p_sum, decay, weight: [4]. Returns false if every P is zero.
template <bool kExact, int kCount>
[[gnu::flatten, gnu::noinline]] bool softmax_rows(RowTile& tile, int row, const Page& page,
                                                  float k_scale, float v_scale, float threshold,
                                                  const int32_t* s, uint8_t* p8, float* p_sum,
                                                  float* decay, float* weight) {
  constexpr int kVecs = kPageTokens / kLanes, kLast = kCount - 1;
  const auto over_rows = [](const F32(&x)[kCount], const auto& combine) {
    return reduce4(x[0], x[1 < kLast ? 1 : kLast], x[2 < kLast ? 2 : kLast], x[kLast], combine);
  };
  const auto larger = [](F32 a, F32 b) { return max(a, b); };
  F32 x[kCount][kVecs], top[kCount];
  unroll<kCount>([&](int r) {
    const float factor = tile.q_scale[row + r] * k_scale;
    for (int i = 0; i < kVecs; ++i) {
      x[r][i] = to_f32(load_i32(s + r * kPageTokens + i * kLanes)) * splat(factor);
    }
    const int64_t first = tile.first_key[row + r] - page.first_key;
    const int64_t end = tile.end_key[row + r] - page.first_key;
    if (first > 0 || end < kPageTokens) mask_scores(first, end, x[r]);
    if (!(__builtin_fabsf(factor) < __builtin_inff())) {
      tile.poisoned[row + r] |= first < kPageTokens && end > 0 && first < end;
    }
    top[r] = x[r][0];
    for (int i = 1; i < kVecs; ++i) top[r] = max(top[r], x[r][i]);
  });

  const F32 old_m = load(tile.m + row);
  const F32 m = max(old_m, over_rows(top, larger));
  // A row that has seen no key keeps -inf, and -inf - -inf would poison it with NaN.
  const F32 base = select(less(m, splat(-__FLT_MAX__)), splat(0.0f), m);
  float new_m[4], bases[4], largest[4], to_code[4];
  store4(new_m, m);
  store4(bases, base);
  store4(decay, exp_nonpositive(old_m - base));

  F32 p_max[kCount];
  unroll<kCount>([&](int r) {
    tile.m[row + r] = new_m[r];
    // Scores that overflow: what follows is then garbage for this row.
    if (!(new_m[r] < __builtin_inff())) tile.poisoned[row + r] = true;
    const F32 below = splat(bases[r]);
    for (int i = 0; i < kVecs; ++i) {
      x[r][i] = kExact ? exp_nonpositive(x[r][i] - below) : sas(x[r][i] - below, splat(threshold));
    }
    F32 sum = x[r][0];
    p_max[r] = x[r][0];
    for (int i = 1; i < kVecs; ++i) {
      sum = sum + x[r][i];
      p_max[r] = max_nonnegative(p_max[r], x[r][i]);
    }
    float* lanes = tile.l + (row + r) * kMaxLanes;
    store(lanes, fma(splat(decay[r]), load(lanes), sum));
  });

  const F32 most = over_rows(p_max, larger);
  store4(largest, most);
  store4(weight, most / splat(kCodeMax) * splat(v_scale));
  store4(to_code, select(less(splat(0.0f), most), splat(kCodeMax) / most, splat(0.0f)));
  F32 sums[kCount];
  bool any_p = false;
  unroll<kCount>([&](int r) {
    any_p |= !(largest[r] == 0.0f);
    I32 sum = splat_i32(0);
    for (int i = 0; i < kVecs; i += 4) {
      I32 code[4];
      for (int j = 0; j < 4; ++j) {
        code[j] = (I32)fma(x[r][i + j], splat(to_code[r]), splat(kBias)) & 0xff;
      }
      const Bytes bytes = pack_bytes(code);
      store_bytes(p8 + r * kPageTokens + i * kLanes, bytes);
      sum = dot_us(sum, bytes, splat_word(0x0101));
    }
    sums[r] = to_f32(sum);
  });
  store4(p_sum, over_rows(sums, [](F32 a, F32 b) { return a + b; }));
  return any_p;
}

/// The softmax of one page for rows [row, row + num_rows) of a tile: takes S8, sets the rest of u.
/// Returns false if every P is zero: then the page changes nothing.
template <bool kExact, int kRows>
inline bool page_softmax(RowTile& tile, int row, int num_rows, const Page& page, float k_scale,
                         float v_scale, float threshold, PageUpdate<kRows>& u) {
  bool any_p = false;
  for (int r = 0; r < num_rows; r += 4) {
    const auto rows = [&]<int kCount>(std::integral_constant<int, kCount>) {
      any_p |= softmax_rows<kExact, kCount>(tile, row + r, page, k_scale, v_scale, threshold,
                                            u.s + r * kPageTokens, u.p8 + r * kPageTokens,
                                            u.p_sum + r, u.decay + r, u.weight + r);
    };
    switch (num_rows - r) {
      case 1:
        rows(std::integral_constant<int, 1>());
        break;
      case 2:
        rows(std::integral_constant<int, 2>());
        break;
      case 3:
        rows(std::integral_constant<int, 3>());
        break;
      default:
        rows(std::integral_constant<int, 4>());
    }
  }
  return any_p;
}

}  // namespace kvcore::turbo::KVCORE_ISA
