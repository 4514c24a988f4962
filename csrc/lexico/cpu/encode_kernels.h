// Kernels of lexico_encode: each works on one thread.
#pragma once

#include "core/cpu/isa.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// Correlations are computed for this many atoms and this many vectors at a time.
constexpr int kPanelAtoms = 64;
constexpr int kRowTile = 6;
// Rows of the Gram matrix and of correlations end at a multiple of four of the longest vectors.
constexpr int kAtomAlignment = 128;
static_assert(kMaxAtoms % kAtomAlignment == 0 && kAtomAlignment % kPanelAtoms == 0);

constexpr int64_t padded_atoms(int64_t atoms) {
  return (atoms + kAtomAlignment - 1) / kAtomAlignment * kAtomAlignment;
}
constexpr int64_t num_panels(int64_t atoms) { return padded_atoms(atoms) / kPanelAtoms; }

// Vectors of one task: they share a pass over the dictionary, 1 MiB at 4096 atoms of head_dim 128.
// With the Gram matrix there is one such pass, and the products, 8 KiB a vector, should stay in a
// level-2 cache beside the rows of two vectors, in bytes or in words; without it there is one at
// every step.
constexpr int kGramBlock = 4 * kRowTile;
constexpr int kRecomputeBlock = 8 * kRowTile;
// With the Gram matrix vectors take turns: while one is searched, the row that the next one needs
// comes from memory.
constexpr int kTurns = 2;

// Of a panel's products with a vector the largest of each lane are kept, by that many lanes.
constexpr int kMaximaLanes = 16;

// Rows of the factor begin at multiples of a vector.
constexpr int64_t factor_stride(int64_t sparsity) { return (sparsity + 7) / 8 * 8; }

/// State of one vector between two steps: the inverse of the Cholesky factor of the selected atoms'
/// Gram matrix, and the coefficients.
struct Pursuit {
  int64_t vector_idx;           // of [batch, heads, tokens]
  int count;                    // atoms selected
  double norm_squared, energy;  // of the vector and of its residual, both after `exponent`
  int exponent;                 // the vector was multiplied by 2^-exponent
  int32_t atoms[kMaxSparsity];
  double targets[kMaxSparsity];  // products of the selected atoms and the vector
  double values[kMaxSparsity];   // coefficients
  // The inverse, lower triangular, [sparsity, factor_stride(sparsity)], and its transpose.
  double *inverse, *transposed;
};

/// What a coarse row of the Gram matrix is multiplied by, and what it has at its own atom: there it
/// is cut off.
struct CoarseScale {
  float factor;
  int16_t diagonal, stored;  // of the row itself, and of the coarse one
};

/// Working memory of one task.
struct EncodeScratch {
  Pursuit* pursuits;  // [block]
  double* factors;    // [block, 2, sparsity, factor_stride]
  float* vectors;     // [block, head_dim]
  // Without the Gram matrix, else null.
  float* residuals;  // [block, head_dim]
  int32_t* maxima;   // [block, num_panels, kMaximaLanes]
  // With it, else null.
  int16_t* correlations;  // [block + 1, padded_atoms], the last of what is being searched
  int16_t* rows;          // [kTurns, sparsity, padded_atoms] of a given matrix, else null
};

/// The dictionary as the kernels read it, and the Gram matrix if it is used.
struct EncodeTables {
  // [num_panels, head_dim / 2, kPanelAtoms, 2]: channels in pairs, zeros for atoms that are not
  // there. Integers, but bf16 for the search with AMX tiles.
  const int16_t* panels;
  const int16_t* gram;  // [atoms, padded_atoms], null if it is given or not used
  // The same in bytes (coarse_row.h), null as it is.
  const int16_t* coarse;      // [atoms, padded_atoms / 2]
  const CoarseScale* scales;  // [atoms]
};

// Fills panels [panel_begin, panel_end), for the search with the Gram matrix or without.
KVCORE_ISA_DECLARE(void pack_dictionary_kernel(const EncodeParams& p, bool with_gram,
                                               int64_t panel_begin, int64_t panel_end,
                                               int16_t* panels))

// Products of the atoms of one panel with those of this and all later ones, both ways.
KVCORE_ISA_DECLARE(void gram_kernel(const EncodeParams& p, const int16_t* panels, int64_t panel,
                                    int16_t* gram))

// Rows [begin, end) of the matrix in bytes.
KVCORE_ISA_DECLARE(void coarse_kernel(const EncodeParams& p, const int16_t* gram, int64_t begin,
                                      int64_t end, int16_t* coarse, CoarseScale* scales))

// Vectors [begin, end), at most the block of scratch, with the Gram matrix or without.
KVCORE_ISA_DECLARE(void encode_kernel(const EncodeParams& p, const EncodeTables& tables,
                                      const EncodeScratch& scratch, bool with_gram, int64_t begin,
                                      int64_t end))

}  // namespace kvcore::lexico
