// The dictionary and its Gram matrix as the encoder's searches read them.
#include "lexico/cpu/coarse_row.h"
#include "lexico/cpu/search_residual.h"

namespace kvcore::lexico::KVCORE_ISA {

void pack_dictionary_kernel(const EncodeParams& p, [[maybe_unused]] bool with_gram,
                            int64_t panel_begin, int64_t panel_end, int16_t* panels) {
  const int head_dim = static_cast<int>(p.head_dim);
  for (int64_t atom = panel_begin * kPanelAtoms; atom < panel_end * kPanelAtoms; ++atom) {
    int16_t words[kMaxHeadDim] = {};
    if (atom < p.atoms) {
      const float* const row = p.dictionary + atom * head_dim;
#if defined(KVCORE_ISA_AMX)
      if (with_gram) {
        quantize_row(row, head_dim, kUnit, words);
      } else {
        round_row(row, head_dim, words);
      }
#else
      quantize_row(row, head_dim, kUnit, words);
#endif
    }
    int16_t* const out = panels + atom / kPanelAtoms * head_dim * kPanelAtoms;
    for (int i = 0; i < head_dim; i += 2) {
      memcpy(out + i * kPanelAtoms + 2 * (atom % kPanelAtoms), words + i, 2 * sizeof(int16_t));
    }
  }
}

void gram_kernel(const EncodeParams& p, const int16_t* panels, int64_t panel, int16_t* gram) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t padded = padded_atoms(p.atoms);
  const int16_t* const own = panels + panel * head_dim * kPanelAtoms;
  const int64_t rows = p.atoms - panel * kPanelAtoms;
  const I32 half = splat_i32(1 << 14);
  for (int64_t other = panel; other < num_panels(p.atoms); ++other) {
    const int16_t* const atoms = panels + other * head_dim * kPanelAtoms;
    int16_t products[kPanelAtoms][kPanelAtoms];
    for (int tile = 0; tile < kPanelAtoms; tile += kRowTile) {
      // The last tile begins earlier, to end with the panel.
      const int row = tile + kRowTile <= kPanelAtoms ? tile : kPanelAtoms - kRowTile;
      for (int atom = 0; atom < kPanelAtoms; atom += kTileAtoms) {
        I32 acc[kRowTile][kChunks];
        correlate_tile<kRowTile>(own + 2 * row, 2, 2 * kPanelAtoms, atoms + 2 * atom, head_dim / 2,
                                 acc);
        for (int r = 0; r < kRowTile; ++r) {
          for (int c = 0; c < kChunks; ++c) {
            store_words(products[row + r] + atom + c * kLanes, (acc[r][c] + half) >> 15);
          }
        }
      }
    }
    for (int r = 0; r < kPanelAtoms && r < rows; ++r) {
      int16_t* const out = gram + (panel * kPanelAtoms + r) * padded + other * kPanelAtoms;
      memcpy(out, products[r], sizeof products[r]);
    }
    if (other == panel) continue;
    for (int n = 0; n < kPanelAtoms && other * kPanelAtoms + n < p.atoms; ++n) {
      int16_t* const out = gram + (other * kPanelAtoms + n) * padded + panel * kPanelAtoms;
      for (int r = 0; r < kPanelAtoms; ++r) out[r] = products[r][n];
    }
  }
}

void coarse_kernel(const EncodeParams& p, const int16_t* gram, int64_t begin, int64_t end,
                   int16_t* coarse, CoarseScale* scales) {
  const int64_t padded = padded_atoms(p.atoms);
  for (int64_t atom = begin; atom < end; ++atom) {
    const int16_t* const row = gram + atom * padded;
    int16_t* const out = coarse + atom * (padded / 2);
    const int64_t own = atom - atom % kWords;
    int16_t lanes[kWords];
    store_bytes(lanes, load_bytes(row + own));
    lanes[atom % kWords] = 0;
    Bytes largest = abs_words(load_bytes(lanes));
    for (int64_t n = 0; n < padded; n += kWords) {
      if (n != own) largest = max_words(largest, abs_words(load_bytes(row + n)));
    }
    store_bytes(lanes, largest);
    int most = static_cast<int>(kCoarseMax / kMaxFactor);
    for (const int lane : lanes) most = lane > most ? lane : most;
    const float factor = static_cast<float>(kCoarseMax - 1) / static_cast<float>(most);
    for (int64_t n = 0; n < padded; n += kPairAtoms) {
      int16_t words[kPairAtoms];
      for (int i = 0; i < kPairAtoms; i += kLanes) {
        const F32 scaled = to_f32(load_words(row + n + i)) * splat(factor);
        // max of negatives is min.
        const F32 above = max(scaled, splat(-kCoarseMax));
        store_words(words + i, to_i32(splat(0.0f) - max(splat(0.0f) - above, splat(-kCoarseMax))));
      }
      store_coarse(out, n, {load_bytes(words), load_bytes(words + kWords)});
    }
    scales[atom] = {factor, row[atom], coarse_product(out, atom)};
  }
}

}  // namespace kvcore::lexico::KVCORE_ISA
