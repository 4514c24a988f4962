// The parts of the backward that need no state: A and P of each chunk, and at the end the sums of
// the gates' gradients.
#pragma once

#include "gdn/cuda/backward_args.cuh"

namespace kvcore::gdn::backward {

constexpr int kPrepareSlots = 2;
constexpr int kPrepareSmemBytes =
    kPrepareSlots * kSquareFloats * static_cast<int>(sizeof(float)) + sizeof(TokenScalars);

/// grid: one CTA for each (slot of the window, value head), heads fastest.
template <int kParts>
__global__ void __launch_bounds__(kBackwardThreads)
    prepare_kernel(const __grid_constant__ BackwardArgs a) {
  if (!a.table.valid()) return;
  const Sizes& s = a.p.sizes;
  const int64_t head = blockIdx.x % s.v_heads, slot = a.begin + blockIdx.x / s.v_heads;
  const Chunk chunk = chunk_of_slot(a.table, slot);
  if (chunk.num_tokens <= 0) return;
  const int64_t index = window_index(a, slot, head), k_head = head / a.group;
  auto* const slots = reinterpret_cast<float*>(dynamic_smem());
  auto& tokens = *reinterpret_cast<TokenScalars*>(slots + kPrepareSlots * kSquareFloats);
  if (threadIdx.x < kChunk) {
    const int i = static_cast<int>(threadIdx.x), last = chunk.num_tokens - 1;
    const int64_t first = chunk.batch_idx * s.num_tokens + chunk.begin;
    const auto g_at = [&](int token) {
      return a.p.g_cumsum[(first + min(token, last)) * s.v_heads + head];
    };
    const float G = g_at(i);
    const float beta =
        i > last ? 0.0f : write_strength(a.gate, chunk.batch_idx, head, chunk.begin + i);
    tokens.G[i] = G;
    tokens.beta[i] = beta;
    TokenScalars& kept = a.tokens[index];
    kept.G[i] = G;
    kept.exp_G[i] = expf(G);
    kept.rest[i] = expf(g_at(last) - G);
    kept.beta[i] = beta;
  }

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_blocks = blocks_of(dim_k(a));
  const auto block_of_step = [&](int step, Block& block) {
    if (step < num_blocks) block = key_block(a, a.k, chunk, k_head, step);
    return step < num_blocks;
  };
  Ring<kPrepareSlots, 1, decltype(block_of_step)> ring(slots, block_of_step);
  Rows scores;
  clear(scores);
  for (int block = 0; block < num_blocks; ++block) {
    const Block q = key_block(a, a.q, chunk, k_head, block);
    const float* const k = ring.next();
    multiply_tiles<kParts, RowsAre::kColumns>(
        scores, [&](int n, Tile& tile) { load_tile(q, warp, n, tile); }, k,
        tiles_in(dim_k(a), block), kTiles);
    __syncthreads();  // two slots: the next copy goes where this one was read
  }
  cp_async_wait<0>();
  const Block x = inverse_block(a, chunk, head);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    Tile inverse;
    load_tile(x, warp, n, inverse);
    const LaneIndex lane = lane_of_warp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * warp + lane.g + 8 * h, j = column_of(lane, n, 0);
      float entries[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool past = j + e <= i && i < chunk.num_tokens;
        const float decay = past_decay(past, tokens.G[i], tokens.G[j + e]);
        entries[0][e] = past ? inverse[2 * h + e] * decay * tokens.beta[j + e] : 0.0f;
        entries[1][e] = past ? scores[n][2 * h + e] * decay * a.p.scale : 0.0f;
      }
      const int64_t at = (index * kChunk + i) * kChunk + j;
      *reinterpret_cast<float2*>(a.a + at) = make_float2(entries[0][0], entries[0][1]);
      *reinterpret_cast<float2*>(a.p_scores + at) = make_float2(entries[1][0], entries[1][1]);
    }
  }
}

/// Gradients of A_log and dt_bias from their parts, in the order of the slots. A thread a head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    gate_sums_kernel(const __grid_constant__ BackwardArgs a) {
  const int64_t v_heads = a.p.sizes.v_heads;
  const int64_t head = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (head >= v_heads || !a.table.valid()) return;
  float sums[2] = {};
  for (int64_t slot = 0; slot < a.num_slots; ++slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] += a.gates[(i * a.num_slots + slot) * v_heads + head];
  }
  if (a.p.dA_log != nullptr) a.p.dA_log[head] = sums[0];
  if (a.p.ddt_bias != nullptr) a.p.ddt_bias[head] = sums[1];
}

}  // namespace kvcore::gdn::backward
