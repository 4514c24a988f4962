// One plain struct per op: what a backend gets after op_*.cpp has checked everything; at the end,
// the functions that get them.
//
// Dimensions: batch, heads, tokens, head_dim, atoms, sparsity. A pointer is followed by its shape;
// every array is contiguous unless it is a view; "may be null" is said.
#pragma once

#include <cstdint>

#include "core/view.h"
#include "lexico/layout.h"

namespace kvcore::lexico {

/// How coefficients are stored.
enum class CoefficientType : int8_t { kInt8, kE4M3, kFloat32 };

struct EncodeParams {
  InputView x;              // [batch, heads, tokens, head_dim]
  const float* dictionary;  // [atoms, head_dim], rows of norm 1
  const float* gram;        // [atoms, atoms] products of the atoms, may be null
  int64_t batch, heads, tokens, head_dim, atoms;
  int64_t sparsity;  // <= kMaxSparsity, atoms and head_dim
  float tolerance;   // relative norm of the residual at which a vector is done
  CoefficientType dtype;
  int16_t* indices;    // [batch, heads, tokens, sparsity]
  void* coefficients;  // [batch, heads, tokens, sparsity] of dtype
  uint16_t* scale;     // [batch, heads, tokens] fp16
  float* residual;     // [batch, heads, tokens] relative norm of the residual
};

struct ReconstructParams {
  const int16_t* indices;    // [batch, heads, tokens, sparsity], in [0, atoms)
  const void* coefficients;  // [batch, heads, tokens, sparsity] of coefficient_type
  CoefficientType coefficient_type;
  const uint16_t* scale;    // [batch, heads, tokens] fp16
  const float* dictionary;  // [atoms, head_dim]
  int64_t batch, heads, tokens, head_dim, atoms, sparsity;
  OutputView out;  // [batch, heads, tokens, head_dim]
};

/// What each library (kvcore_cpu, kvcore_cuda, kvcore_simt) defines for itself.
namespace backend {

/// True if op_*.cpp may look at the values of index tensors for nothing; then they are always
/// checked. Otherwise a look costs a copy and a synchronisation, and only check_values pays it.
extern const bool kHostReadsValues;

void encode(const EncodeParams& params);
void reconstruct(const ReconstructParams& params);

}  // namespace backend
}  // namespace kvcore::lexico
