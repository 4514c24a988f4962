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

struct AppendParams {
  // New codes, [batch, kv_heads, num_new, sparsity] and [batch, kv_heads, num_new].
  const int16_t *k_indices, *v_indices;
  const int8_t *k_coefficients, *v_coefficients;
  const uint16_t *k_scale, *v_scale;
  int64_t batch, kv_heads, num_new, k_sparsity, v_sparsity;
  uint8_t* k_tail;     // [batch, kv_heads, k_tiles, tile_bytes(k_sparsity)]
  uint8_t* v_tail;     // [batch, kv_heads, v_tiles, tile_bytes(v_sparsity)]
  int32_t* tail_lens;  // [batch] tokens in the tails, raised by num_new
  int64_t k_tiles, v_tiles;
};

struct SealParams {
  const uint8_t* k_tail;  // [batch, kv_heads, kBlockTiles, tile_bytes(k_sparsity)]
  const uint8_t* v_tail;  // [batch, kv_heads, kBlockTiles, tile_bytes(v_sparsity)]
  int64_t batch, kv_heads, k_sparsity, v_sparsity, v_atoms;
  uint8_t* k_block;  // [batch, kv_heads, k_bytes]
  uint8_t* v_block;  // [batch, kv_heads, v_bytes]
  int64_t k_bytes, v_bytes;
};

/// What the blocks of a tail need: bytes of the largest one of K and of V.
struct SealSizes {
  int64_t k_bytes, v_bytes;
  int64_t bad_index;  // the largest of v_tail that names no atom, or -1
};

struct UnsealParams {
  const uint8_t* k_block;  // [batch, kv_heads, k_bytes]
  const uint8_t* v_block;  // [batch, kv_heads, v_bytes]
  int64_t k_bytes, v_bytes;
  int64_t batch, kv_heads, k_sparsity, v_sparsity, v_atoms;
  uint8_t* k_tail;  // [batch, kv_heads, kBlockTiles, tile_bytes(k_sparsity)]
  uint8_t* v_tail;  // [batch, kv_heads, kBlockTiles, tile_bytes(v_sparsity)]
};

struct UnpackParams {
  const uint8_t* tail;  // [batch, kv_heads, tiles, tile_bytes(sparsity)]
  int64_t batch, kv_heads, tiles, sparsity;
  int64_t kv_len;        // tokens of the outputs, those of the tail from the first on
  int16_t* indices;      // [batch, kv_heads, kv_len, sparsity]
  int8_t* coefficients;  // [batch, kv_heads, kv_len, sparsity]
  uint16_t* scale;       // [batch, kv_heads, kv_len]
};

/// Sealed codes of kBlockTokens tokens, of K or of V.
struct Block {
  const uint8_t* data;  // [batch, kv_heads, bytes]
  int64_t bytes;
};

struct AttentionParams {
  InputView q;                   // [batch, q_heads, q_len, head_dim]
  const Block* k_blocks;         // [num_blocks], host memory
  const Block* v_blocks;         // [num_blocks], host memory
  const uint8_t* k_tail;         // [batch, kv_heads, k_tiles, tile_bytes(k_sparsity)]
  const uint8_t* v_tail;         // [batch, kv_heads, v_tiles, tile_bytes(v_sparsity)]
  const int32_t* tail_lens;      // [batch] tokens in the tails
  const float* k_dictionary;     // [k_atoms, head_dim]
  const float* v_dictionary;     // [v_atoms, head_dim]
  InputView k_buffer, v_buffer;  // [batch, kv_heads, buffer_len, head_dim], the newest tokens
  const int32_t* buffer_lens;    // [batch] tokens in the buffers, may be null (buffer_len)
  const int32_t* left_padding;   // [batch] leading tokens that no query sees, may be null
  int64_t batch, q_heads, kv_heads, q_len, head_dim;
  int64_t num_blocks, k_tiles, v_tiles, k_sparsity, v_sparsity, k_atoms, v_atoms, buffer_len;
  float scale;
  bool causal;     // bottom-right aligned
  int64_t window;  // a query sees the last `window` keys up to its own; 0: all
  OutputView out;  // [batch, q_heads, q_len, head_dim]
  float* lse;      // [batch, q_heads, q_len]
};

/// What each library (kvcore_cpu, kvcore_cuda, kvcore_simt) defines for itself.
namespace backend {

void encode(const EncodeParams& params);
void reconstruct(const ReconstructParams& params);
void append(const AppendParams& params);
SealSizes seal_sizes(const SealParams& params);
/// Throws on the CPU if the codes of a head have one atom more than kMaxAtomPairs times.
void seal(const SealParams& params);
/// Throws on the CPU if a block is not one that seal makes.
void unseal(const UnsealParams& params);
void unpack(const UnpackParams& params);
/// Throws on the CPU if a block or a tail is not one that append and seal make of these atoms.
void attention(const AttentionParams& params);

}  // namespace backend
}  // namespace kvcore::lexico
