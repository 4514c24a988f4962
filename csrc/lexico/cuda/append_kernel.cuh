// lexico_append: a CTA for every tile that the new tokens of a head may reach. A lane writes the
// pairs of one token, so that what a warp writes is contiguous; what it reads is, over its loop.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "lexico/cuda/tiles.cuh"

namespace kvcore::lexico {

constexpr int kAppendThreads = 128;

struct AppendArgs {
  AppendParams p;
  int64_t capacity;   // tokens that both tails hold
  int64_t num_tiles;  // that num_new tokens may reach
  uint32_t* error_flags;

  /// Whether the new tokens fit behind those of a sequence.
  __device__ bool fits(int64_t tail_len) const {
    return tail_len >= 0 && tail_len <= capacity && p.num_new <= capacity - tail_len;
  }
};

__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ AppendArgs args) {
  const AppendParams& p = args.p;
  const int64_t head = blockIdx.x / args.num_tiles / 2;
  const bool is_k = blockIdx.x / args.num_tiles % 2 == 0;
  const int64_t begin = p.tail_lens[head / p.kv_heads];
  if (!args.fits(begin)) {
    if (threadIdx.x == 0) report_error(args.error_flags, kErrorTailLens);
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kTileTokens;
  const int64_t tile_idx = begin / kTileTokens + blockIdx.x % args.num_tiles;
  const int64_t token = tile_idx * kTileTokens + lane - begin;  // of the new ones
  if (token < 0 || token >= p.num_new) return;
  const int64_t row = head * p.num_new + token;
  const int64_t sparsity = is_k ? p.k_sparsity : p.v_sparsity;
  const int64_t tiles = is_k ? p.k_tiles : p.v_tiles;
  const int16_t* indices = (is_k ? p.k_indices : p.v_indices) + row * sparsity;
  const int8_t* coefficients = (is_k ? p.k_coefficients : p.v_coefficients) + row * sparsity;
  const MutableTile tile = mutable_tile_at(
      (is_k ? p.k_tail : p.v_tail) + (head * tiles + tile_idx) * tile_bytes(sparsity), sparsity);
  const int warp = static_cast<int>(threadIdx.x) / kTileTokens;
  if (warp == 0) tile.scale[lane] = (is_k ? p.k_scale : p.v_scale)[row];
  for (int j = warp; j < sparsity; j += kAppendThreads / kTileTokens) {
    tile.set(j, lane, indices[j], coefficients[j]);
  }
}

/// Raises the lengths, after append_kernel has read them.
__global__ void __launch_bounds__(kAppendThreads)
    raise_lens_kernel(const __grid_constant__ AppendArgs args) {
  const int64_t b = int64_t{blockIdx.x} * kAppendThreads + threadIdx.x;
  if (b >= args.p.batch || !args.fits(args.p.tail_lens[b])) return;
  args.p.tail_lens[b] += static_cast<int32_t>(args.p.num_new);
}

}  // namespace kvcore::lexico
