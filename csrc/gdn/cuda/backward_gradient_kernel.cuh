// Gradients of a chunk once the states before it and their gradients behind it are known.
//
// grid: one CTA for each (slot of the window, key head), heads fastest. Value heads of the key head
// come one after the other and add up their dQ and dK, in their order. A warp has 16 tokens as the
// rows of its products: operand A comes from memory or from another square in shared memory, B
// from the ring. Numbers in comments are those of the equations in csrc/gdn/README.md.
#pragma once

#include "gdn/cuda/backward_gradient_head.cuh"

namespace kvcore::gdn::backward {

/// 8: through the norm, and out. which: 0 for q, 1 for k.
__device__ inline void store_keys(const BackwardArgs& a, const Chunk& chunk, int64_t slot,
                                  int64_t k_head, int which, int warp) {
  const Sizes& s = a.p.sizes;
  const float* const sums =
      a.dqk + (((slot - a.begin) * s.k_heads + k_head) * 2 + which) * kChunk * s.k_dim;
  const int64_t first = chunk.batch_idx * s.num_tokens + chunk.begin;
  const auto load = [&](int block, Rows& d, Rows& y) {
    load_rows({sums + block * kChunk, s.k_dim, chunk.num_tokens, left_in(dim_k(a), block)}, warp,
              d);
    load_rows(key_block(a, which == 0 ? a.q : a.k, chunk, k_head, block), warp, y);
  };
  Rows d, y;
  float along[2] = {};
  for (int block = 0; block < blocks_of(dim_k(a)) && a.p.qk_l2norm; ++block) {
    load(block, d, y);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) along[e / 2] = __fmaf_rn(y[n][e], d[n][e], along[e / 2]);
    }
  }
  float rstd[2] = {1.0f, 1.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    along[h] = warp_sum<4>(along[h]);
    const int i = 16 * warp + lane_of_warp().g + 8 * h;
    if (a.p.qk_l2norm && i < chunk.num_tokens) {
      rstd[h] = a.p.rstd[(which * s.batch * s.num_tokens + first + i) * s.k_heads + k_head];
    }
  }
  for (int block = 0; block < blocks_of(dim_k(a)); ++block) {
    load(block, d, y);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const LaneIndex lane = lane_of_warp();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * warp + row_of(lane, e), j = column_of(lane, n, e);
        if (i >= chunk.num_tokens || j >= left_in(dim_k(a), block)) continue;
        const float x =
            a.p.qk_l2norm ? rstd[e / 2] * __fmaf_rn(-along[e / 2], y[n][e], d[n][e]) : d[n][e];
        store_element(which == 0 ? a.p.dq : a.p.dk,
                      ((first + i) * s.k_heads + k_head) * s.k_dim + block * kChunk + j, x);
      }
    }
  }
}

template <int kParts>
__global__ void __launch_bounds__(kBackwardThreads)
    gradients_kernel(const __grid_constant__ BackwardArgs a) {
  if (!a.table.valid()) return;
  const Sizes& s = a.p.sizes;
  const int64_t k_head = blockIdx.x % s.k_heads, slot = a.begin + blockIdx.x / s.k_heads;
  const Chunk chunk = chunk_of_slot(a.table, slot);
  const int64_t first_head = k_head * a.group;
  if (chunk.num_tokens <= 0) {
    for (int i = static_cast<int>(threadIdx.x); i < a.group; i += kBackwardThreads) {
      a.gates[slot * s.v_heads + first_head + i] = 0.0f;
      a.gates[(a.num_slots + slot) * s.v_heads + first_head + i] = 0.0f;
    }
    return;
  }
  auto& smem = *reinterpret_cast<GradientSmem*>(dynamic_smem());
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int k_blocks = blocks_of(dim_k(a)), v_blocks = blocks_of(dim_v(a));
  // U; W; X; k; and for each block of keys: S and dS in turn, k, q.
  const int before_keys = 2 * v_blocks + 1 + k_blocks, per_key_block = 2 * v_blocks + 2;
  const int per_head = before_keys + k_blocks * per_key_block;
  const auto block_of = [&](int64_t head, int i) {
    const int64_t index = window_index(a, slot, head);
    if (i < v_blocks) return value_block(a, a.u, index, i);
    i -= v_blocks;
    if (i < v_blocks) return value_block(a, a.w, index, i);
    i -= v_blocks;
    if (i == 0) return inverse_block(a, chunk, head);
    i -= 1;
    if (i < k_blocks) return key_block(a, a.k, chunk, k_head, i);
    i -= k_blocks;
    const int k_block = i / per_key_block, part = i % per_key_block;
    if (part < 2 * v_blocks) {
      return state_block(a, part % 2 == 0 ? a.state : a.d_state, index, part / 2, k_block);
    }
    return key_block(a, part == 2 * v_blocks ? a.k : a.q, chunk, k_head, k_block);
  };
  const auto block_of_step = [&](int step, Block& block) {
    const int of_group = step / per_head;
    if (of_group < a.group) block = block_of(first_head + of_group, step % per_head);
    return of_group < a.group;
  };
  Ring<kGradientSlots, 1, decltype(block_of_step)> ring(smem.slots[0], block_of_step);
  for (int i = 0; i < a.group; ++i) {
    const int64_t head = first_head + i, index = window_index(a, slot, head);
    GradientHead<kParts> task{a, smem, chunk, head, k_head, index, warp};
    __syncthreads();  // the head before is done with its tokens
    if (threadIdx.x < sizeof(TokenScalars) / kUnitBytes) {
      const auto* const from = reinterpret_cast<const uint4*>(a.tokens + index);
      reinterpret_cast<uint4*>(&smem.tokens)[threadIdx.x] = from[threadIdx.x];
    }
    __syncthreads();
    RowSums sums;
    task.scores(ring, sums);
    Rows d;
    task.inverse_gradient(ring, sums, d);
    task.system(ring, sums, d);
    for (int block = 0; block < k_blocks; ++block) task.keys(ring, sums, block, i == 0);
    task.tokens(sums, slot);
  }
  cp_async_wait<0>();
  store_keys(a, chunk, slot, k_head, 0, warp);
  store_keys(a, chunk, slot, k_head, 1, warp);
}

}  // namespace kvcore::gdn::backward
