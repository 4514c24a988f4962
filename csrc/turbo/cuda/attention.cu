// turbo_attention on CUDA: K and V are quantized page by page into scratch memory, then attended.
#include "core/cuda/error_flags.cuh"
#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "turbo/cuda/attention_launch.h"
#include "turbo/cuda/attention_quantize_kernel.cuh"
#include "turbo/cuda/softmax.cuh"

namespace kvcore::turbo::backend {

void attention(const AttentionParams& p) {
  AttentionArgs args = {};
  args.p = p;
  args.group = p.q_heads / p.kv_heads;
  args.threshold = score_threshold(p.softmax);
  args.error_flags = error_flags();
  const int64_t tile_rows = attention_tile_rows(static_cast<int>(p.head_dim));
  if (p.cu_seqlens_q == nullptr) {
    const PageRange seen = visible_pages(p.softmax, p.q_len, p.kv_len, 0, p.q_len - 1);
    args.first_page = seen.begin;
    args.pages_per_seq = seen.end - seen.begin;
    args.tiles_per_seq = ceil_div(p.q_len * args.group, tile_rows);
    args.num_pages = p.batch * args.pages_per_seq;
    args.num_tiles = p.batch * args.tiles_per_seq;
  } else {
    // With one slot more than tokens fill even if there is no sequence: NaN goes to all of them.
    const int64_t num_seqs = p.num_seqs > 0 ? p.num_seqs : 1;
    args.num_pages = p.kv_len / kPageTokens + num_seqs;
    args.num_tiles = p.q_len * args.group / tile_rows + num_seqs;
  }

  const Scratch pages(
      byte_count({p.kv_heads, args.num_pages, prefill_page_bytes(static_cast<int>(p.head_dim))}));
  const Scratch is_valid(sizeof(int32_t));
  args.pages = pages.data();
  if (p.cu_seqlens_q != nullptr) {
    constexpr int kThreads = 256;
    args.is_valid = reinterpret_cast<int32_t*>(is_valid.data());
    launch(check_cu_seqlens_kernel<kThreads>, dim3(1), dim3(kThreads), 0, current_stream(), args);
  }
  if (args.num_pages > 0) {
    dispatch_dtype(p.k.dtype, [&](auto type) {
      launch_attention_quantize<typename decltype(type)::type>(args);
    });
  }
  dispatch<64, 96, 128, 256>("head_dim", p.head_dim,
                             [&](auto head_dim) { launch_attention<head_dim()>(args); });
}

}  // namespace kvcore::turbo::backend
