// The search by products of the residuals with every atom. For code that is compiled per ISA level.
//
// In 16-bit integers, or bf16 with AMX tiles. Of each row the largest magnitude is kept for every
// panel and lane; where one lies within the rounding's bound of the largest of all, the products
// of that lane are computed again in fp32, which decides.
#pragma once

#include "lexico/cpu/correlate.h"
#if defined(KVCORE_ISA_AMX)
#include "lexico/cpu/search_tiles.h"
#endif

namespace kvcore::lexico::KVCORE_ISA {

static_assert(kLanes <= kMaximaLanes && kPanelAtoms % kLanes == 0);

#if defined(KVCORE_ISA_AMX)

/// maxima [rows, num_panels, kMaximaLanes] of the first `rows` of kRecomputeBlock residuals: bits
/// of floats, which are in the order of the floats.
inline void correlate_maxima(const EncodeParams& p, const int16_t* panels, const float* residuals,
                             const float*, int rows, int32_t* maxima) {
  const int head_dim = static_cast<int>(p.head_dim);
  alignas(64) int16_t pairs[kRecomputeBlock * kMaxHeadDim];
  for (int row = 0; row < kRecomputeBlock; ++row) {
    round_row(residuals + row * head_dim, head_dim, pairs + row * head_dim);
  }
  configure_search_tiles();
  const int num_groups = (rows + kTileMaxRows - 1) / kTileMaxRows;
  alignas(64) float products[kPanelAtoms / kLanes][kRecomputeBlock * kLanes];
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int c = 0; c < kPanelAtoms / kLanes; ++c) {
      correlate_tiles(pairs, num_groups, panels + panel * head_dim * kPanelAtoms + 2 * c * kLanes,
                      head_dim, products[c]);
    }
    for (int row = 0; row < rows; ++row) {
      F32 largest = splat(0.0f);
      for (int c = 0; c < kPanelAtoms / kLanes; ++c) {
        largest = max(abs(load(products[c] + row * kLanes)), largest);
      }
      store_i32(maxima + (row * num_panels(p.atoms) + panel) * kMaximaLanes, (I32)largest);
    }
  }
  tile_release();
}

/// The least of a residual's maxima that the largest product can hide behind.
inline int32_t least_maximum(const EncodeParams&, int32_t largest, float norm) {
  // Each factor is off by 2^-9 of itself at most, so a product with an atom of norm 1 by 2^-8 of
  // the residual's norm, and of two products that the rounding exchanges by twice that.
  const float least = bits_to_float(static_cast<uint32_t>(largest)) - 0x1.02p-7f * norm;
  return least > 0 ? static_cast<int32_t>(float_to_bits(least)) : 0;
}

#else

/// maxima [rows, num_panels, kMaximaLanes] of the first `rows` of kRecomputeBlock residuals, in
/// units of their norms over kUnit^2.
inline void correlate_maxima(const EncodeParams& p, const int16_t* panels, const float* residuals,
                             const float* norms, int rows, int32_t* maxima) {
  const int head_dim = static_cast<int>(p.head_dim);
  int16_t words[kRecomputeBlock * kMaxHeadDim];
  for (int row = 0; row < kRecomputeBlock; ++row) {
    const float scale = row < rows && norms[row] > 0 ? kUnit / norms[row] : 0;
    quantize_row(residuals + row * head_dim, head_dim, scale, words + row * head_dim);
  }
  static_assert(kRecomputeBlock % kRowTile == 0);
  for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
    for (int row = 0; row < rows; row += kRowTile) {
      int32_t* const out = maxima + (row * num_panels(p.atoms) + panel) * kMaximaLanes;
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        I32 acc[kRowTile][kChunks];
        correlate_tile<kRowTile>(words + row * head_dim, head_dim, 2,
                                 panels + panel * head_dim * kPanelAtoms + 2 * atom, head_dim / 2,
                                 acc);
        for (int r = 0; r < kRowTile; ++r) {
          int32_t* const lanes = out + r * num_panels(p.atoms) * kMaximaLanes;
          I32 largest = atom == 0 ? splat_i32(0) : load_i32(lanes);
          for (int c = 0; c < kChunks; ++c) largest = max_i32(largest, abs_i32(acc[r][c]));
          store_i32(lanes, largest);
        }
      }
    }
  }
}

/// The least of a residual's maxima that the largest product can hide behind.
inline int32_t least_maximum(const EncodeParams& p, int32_t largest, float) {
  const float channels = rounding_of_channels(static_cast<int>(p.head_dim));
  // Both factors are rounded, and so are two products that change places.
  const double off = double{kUnit} * kUnit * (2 * channels + float_error(0));
  const double least = largest - 2 * off;
  return least > 0 ? static_cast<int32_t>(least) : 0;
}

#endif

/// Best atoms of the first `rows` of kRecomputeBlock residuals.
inline void search_residuals(const EncodeParams& p, const int16_t* panels, const float* residuals,
                             int rows, int32_t* maxima, Best* found) {
  const int head_dim = static_cast<int>(p.head_dim);
  float norms[kRecomputeBlock] = {};
  for (int row = 0; row < rows; ++row) {
    const float* const residual = residuals + row * head_dim;
    norms[row] = __builtin_sqrtf(dot(residual, residual, head_dim));
  }
  correlate_maxima(p, panels, residuals, norms, rows, maxima);
  for (int row = 0; row < rows; ++row) {
    const float* const residual = residuals + row * head_dim;
    const int32_t* const all = maxima + row * num_panels(p.atoms) * kMaximaLanes;
    I32 largest = splat_i32(0);
    for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
      largest = max_i32(largest, load_i32(all + panel * kMaximaLanes));
    }
    int32_t lanes[kLanes], most = 0;
    store_i32(lanes, largest);
    for (int lane = 0; lane < kLanes; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
    const int32_t least = least_maximum(p, most, norms[row]);
    const I32 below = splat_i32(least - 1);
    Best best;
    for (int64_t panel = 0; panel < num_panels(p.atoms); ++panel) {
      const int32_t* const values = all + panel * kMaximaLanes;
      if (!any(less(below, load_i32(values)))) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (values[lane] < least) continue;
        for (int n = lane; n < kPanelAtoms; n += kLanes) {
          best.look_at(p, residual, panel * kPanelAtoms + n);
        }
      }
    }
    found[row] = best;
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
