// Kernels of lexico_encode: each works on one thread.
#pragma once

#include "core/cpu/isa.h"
#include "lexico/params.h"

namespace kvcore::lexico {

// Correlations are computed for this many atoms and this many vectors at a time.
constexpr int kPanelAtoms = 64;
constexpr int kRowTile = 6;
static_assert(kMaxAtoms % kPanelAtoms == 0);

constexpr int64_t num_panels(int64_t atoms) { return (atoms + kPanelAtoms - 1) / kPanelAtoms; }
constexpr int64_t padded_atoms(int64_t atoms) { return num_panels(atoms) * kPanelAtoms; }

// Vectors of one task. With the Gram matrix their correlations, 16 KiB each at 4096 atoms, should
// stay in a level-2 cache beside the rows of G in use; without it a task reads the whole dictionary
// at every step, and more vectors share that.
constexpr int kGramBlock = 2 * kRowTile;
constexpr int kRecomputeBlock = 8 * kRowTile;

/// State of one vector between two steps: the inverse of the Cholesky factor of the selected atoms'
/// Gram matrix, and the coefficients.
struct Pursuit {
  int64_t vector_idx;           // of [batch, heads, tokens]
  int count;                    // atoms selected
  double norm_squared, energy;  // of the vector and of its residual, both after `exponent`
  int exponent;                 // the vector was multiplied by 2^-exponent
  int32_t atoms[kMaxSparsity];
  double targets[kMaxSparsity];                // products of the selected atoms and the vector
  double values[kMaxSparsity];                 // coefficients
  double inverse[kMaxSparsity][kMaxSparsity];  // lower triangular
};

/// Working memory of one task.
struct EncodeScratch {
  Pursuit* pursuits;    // [block]
  float* vectors;       // [block, head_dim]
  float* residuals;     // [block, head_dim], null with the Gram matrix
  float* correlations;  // [block, padded_atoms], null without it
};

/// The dictionary as the kernels read it, and the Gram matrix if it is used.
struct EncodeTables {
  // [num_panels, head_dim, kPanelAtoms] fp32, zeros for atoms that are not there. Without the Gram
  // matrix and with AVX-512 BF16: pairs of bf16, [num_panels, head_dim / 2, kPanelAtoms].
  const void* panels;
  const float* gram;  // [atoms, atoms], may be null
};

// Fills panels [panel_begin, panel_end) of a table, for the search with the Gram matrix or without.
KVCORE_ISA_DECLARE(void pack_dictionary_kernel(const EncodeParams& p, bool with_gram,
                                               int64_t panel_begin, int64_t panel_end,
                                               void* panels))

// Rows [row_begin, row_end) of the Gram matrix [atoms, atoms].
KVCORE_ISA_DECLARE(void gram_kernel(const EncodeParams& p, const void* panels, int64_t row_begin,
                                    int64_t row_end, float* gram))

// Vectors [begin, end), at most the block of scratch.
KVCORE_ISA_DECLARE(void encode_kernel(const EncodeParams& p, const EncodeTables& tables,
                                      const EncodeScratch& scratch, int64_t begin, int64_t end))

}  // namespace kvcore::lexico
