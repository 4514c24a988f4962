// Stage 1 of the pages of turbo_attention: single-threaded, compiled per ISA level.
#include "turbo/cpu/codes.h"
#include "turbo/cpu/stage1.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo::KVCORE_ISA {

void quantize_page(const InputView& x, const float* mean, const float* balance, int64_t batch_idx,
                   int64_t head_idx, int64_t token_idx, int64_t num_tokens, int kv, int head_dim,
                   uint8_t* block) {
  alignas(64) float rows[kPageTokens * kMaxHeadDim];
  alignas(64) int8_t codes[kPageTokens * kMaxHeadDim];
  const Magnitude magnitude =
      load_rows(x, mean, balance, batch_idx, head_idx, token_idx, num_tokens, head_dim, rows);
  const float scale = quantize_rows(rows, magnitude, num_tokens, head_dim, codes);
  memset(codes + num_tokens * head_dim, 0, (kPageTokens - num_tokens) * head_dim);
  pack_block(codes, kv, 8, head_dim, scale, 0, block);
}

}  // namespace kvcore::turbo::KVCORE_ISA
