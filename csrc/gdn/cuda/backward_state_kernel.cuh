// The serial parts of the backward: states through the window's chunks, and gradients of states
// back through them.
//
// grid: one CTA for each (sequence, value head, slice of 64 value channels), slices fastest; each
// of its four warps has 16 channels. A warp holds the state transposed, value channels being rows
// of its products: the sums of each product are operand A of the next, and nothing leaves the warp.
// The CTA's warps share the squares of k, q, A and P, which come one after the other.
#pragma once

#include "gdn/cuda/backward_args.cuh"
#include "gdn/cuda/head_slices.cuh"

namespace kvcore::gdn::backward {

/// What a CTA works on: chunks [first, end) of a sequence, which lie in the window. It is kept in
/// shared memory: registers are scarce.
struct StateTask {
  int64_t state;  // of the sequence and head, in the arrays of states
  int64_t head, k_head;
  Sequence sequence;
  int64_t first, end;
  int slice;

  /// First of the warp's value channels.
  __device__ __forceinline__ int column() const { return slice * kChunk + recomputed_warp() * 16; }
  /// The chunk's place in the window's arrays.
  __device__ __forceinline__ int64_t index(const BackwardArgs& a, int64_t idx) const {
    return window_index(a, sequence.first_slot + idx, head);
  }
  __device__ __forceinline__ Chunk chunk(int64_t idx) const {
    const int64_t done = idx * kChunk;
    return {sequence.batch_idx, sequence.begin + done,
            static_cast<int>(min(int64_t{kChunk}, sequence.length - done))};
  }
};
__device__ inline StateTask state_task(const BackwardArgs& a) {
  const Sizes& s = a.p.sizes;
  const auto [seq, head, k_head, column] = head_slice<kChunk>(s);
  const Sequence sequence = sequence_at(a.table, seq);
  return {.state = (seq * s.v_heads + head) * s.k_dim * s.v_dim,
          .head = head,
          .k_head = k_head,
          .sequence = sequence,
          .first = max(int64_t{0}, a.begin - sequence.first_slot),
          .end = min(sequence.num_chunks(), a.end - sequence.first_slot),
          .slice = static_cast<int>(column / kChunk)};
}

struct StateSmem {
  float slots[kBackwardStateSlots][kSquareFloats];
  StateTask task;
};
static_assert(sizeof(StateSmem) <= kPortableSmemBytes);

/// The CTA's task, for all of its threads to see.
__device__ inline StateSmem& begin_state_task(const BackwardArgs& a) {
  auto& smem = *reinterpret_cast<StateSmem*>(dynamic_smem());
  if (threadIdx.x == 0) smem.task = state_task(a);
  __syncthreads();
  return smem;
}

template <int kParts, int kMaxDim>
class StateRows {
 public:
  static constexpr int kBlocks = kMaxDim / kChunk;

  /// Channels [column, column + 16) of a state, or zeros.
  __device__ void load(const BackwardArgs& a, const float* state, bool v_first, int column) {
    each(a, v_first, column,
         [&](float& x, bool inside, int at) { x = inside && state != nullptr ? state[at] : 0.0f; });
  }
  __device__ void store(const BackwardArgs& a, float* state, bool v_first, int column) {
    each(a, v_first, column, [&](float& x, bool inside, int at) {
      if (inside) state[at] = x;
    });
  }
  /// To the window's arrays, where rows are value channels.
  __device__ void keep(const BackwardArgs& a, float* state, int column) const {
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
      if (8 * n >= dim_k(a)) break;
      const LaneIndex lane = lane_of_warp();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = int64_t{column + lane.g + 8 * h} * dim_k(a) + column_of(lane, n, 0);
        *reinterpret_cast<float2*>(state + at) = make_float2(rows_[n][2 * h], rows_[n][2 * h + 1]);
      }
    }
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rows_[n][e] *= factor;
    }
  }
  /// sums += the state's block of keys * (k's tokens as columns).
  template <int kBlock>
  __device__ void read(Rows& sums, const float* k, int tiles) const {
    multiply<kParts, RowsAre::kColumns>(sums, rows_ + kBlock * kTiles, k, tiles, kTiles);
  }
  /// The state's block of keys += values * k.
  template <int kBlock>
  __device__ void write(const Rows& values, const float* k, int tiles) {
    multiply<kParts, RowsAre::kInner>(rows_ + kBlock * kTiles, values, k, kTiles, tiles);
  }

 private:
  template <class F>
  __device__ void each(const BackwardArgs& a, bool v_first, int column, F&& f) {
    const int k_stride = v_first ? 1 : dim_v(a), v_stride = v_first ? dim_k(a) : 1;
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
      const LaneIndex lane = lane_of_warp();
      // One address after the other: all of them would fill the registers.
      const int at = recompute((8 * n + 2 * lane.t) * k_stride + (column + lane.g) * v_stride);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(rows_[n][e], 8 * n < dim_k(a), at + e % 2 * k_stride + e / 2 * 8 * v_stride);
      }
    }
  }

  Tile rows_[kMaxDim / 8];
};

/// f(element, token, offset in [kChunk, v_dim]) of rows of value channels.
template <class F>
__device__ __forceinline__ void each_value(Rows& rows, int column, int v_dim, const F& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const LaneIndex lane = lane_of_warp();
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = column_of(lane, n, e);
      f(rows[n][e], token, token * v_dim + column + row_of(lane, e));
    }
  }
}

/// Tile n of the warp's value channels of a square of tokens, transposed.
__device__ __forceinline__ void read_values(const float* square, int n, Tile& tile) {
  read_tile<true>(square, recomputed_warp(), n, tile);
}
__device__ __forceinline__ void store_values(const BackwardArgs& a, float* array, int64_t index,
                                             const StateTask& task, Rows& rows) {
  float* const first = array + index * kChunk * dim_v(a);
  each_value(rows, task.column(), dim_v(a), [&](float& x, int, int at) { first[at] = x; });
}

/// States before the window's chunks, and W and U. Without `keep` only the state at its end.
template <int kParts, int kMaxDim>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardCtas)
    states_kernel(const __grid_constant__ BackwardArgs a, bool keep) {
  constexpr int kBlocks = kMaxDim / kChunk;
  if (!a.table.valid()) return;
  StateSmem& smem = begin_state_task(a);
  const StateTask& task = smem.task;
  if (task.first >= task.end) return;
  const auto has_columns = [&] { return task.column() < dim_v(a); };
  const int64_t state_floats = int64_t{dim_k(a)} * dim_v(a);

  StateRows<kParts, kMaxDim> state;
  if (has_columns()) {
    const int64_t boundary = (a.window * a.p.sizes.v_heads + task.head) * state_floats;
    if (task.first == 0) {
      state.load(a, a.p.initial_state == nullptr ? nullptr : a.p.initial_state + task.state,
                 a.p.state_v_first, task.column());
    } else {
      state.load(a, a.boundaries + boundary, false, task.column());
    }
  }
  const auto block_of_step = [&](int step, Block& block) {
    // k; v; A; k.
    const int num_keys = blocks_of(dim_k(a)), per_chunk = 2 * num_keys + 2;
    const int64_t idx = task.first + step / per_chunk;
    const int i = step % per_chunk;
    if (idx >= task.end) return false;
    if (i == num_keys) {
      block =
          token_block(a, a.v, task.chunk(idx), a.p.sizes.v_heads, task.head, dim_v(a), task.slice);
    } else if (i == num_keys + 1) {
      block = square_block(a.a, task.index(a, idx));
    } else {
      block = key_block(a, a.k, task.chunk(idx), task.k_head, i < num_keys ? i : i - num_keys - 2);
    }
    return true;
  };
  Ring<kBackwardStateSlots, 1, decltype(block_of_step)> ring(smem.slots[0], block_of_step);
  for (int done = 0; task.first + done < task.end; ++done) {
    // Computed anew where they are needed: the state leaves no registers for them.
    const auto idx = [&] { return task.first + done; };
    const auto index = [&] { return task.index(a, idx()); };
    if (keep && has_columns()) {
      state.keep(a, a.state + index() * dim_k(a) * dim_v(a), task.column());
    }
    Rows u;  // K S, then W, then U, in the same place
    clear(u);
    for_each_constant<kBlocks>([&](auto block) {
      if (block() * kChunk >= dim_k(a)) return;
      const float* const k = ring.next();
      if (has_columns()) state.template read<block()>(u, k, tiles_in(dim_k(a), block()));
    });
    const float* const v = ring.next();
    if (has_columns()) {
      const TokenScalars& tokens = a.tokens[index()];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        Tile tile;
        read_values(v, n, tile);
        const LaneIndex lane = lane_of_warp();
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          u[n][e] = __fmaf_rn(-tokens.exp_G[column_of(lane, n, e)], u[n][e], tile[e]);
        }
      }
    }
    const float* const square = ring.next();
    if (has_columns()) {
      const TokenScalars& tokens = a.tokens[index()];
      if (keep) store_values(a, a.w, index(), task, u);
      multiply_triangle<kParts, RowsAre::kColumns>(u, square);
      if (keep) store_values(a, a.u, index(), task, u);
      each_value(u, 0, 0, [&](float& x, int token, int) { x *= tokens.rest[token]; });
      state.scale(tokens.exp_G[kChunk - 1]);
    }
    for_each_constant<kBlocks>([&](auto block) {
      if (block() * kChunk >= dim_k(a)) return;
      const float* const k = ring.next();
      if (has_columns()) state.template write<block()>(u, k, tiles_in(dim_k(a), block()));
    });
  }
  cp_async_wait<0>();
  if (has_columns() && task.end < task.sequence.num_chunks()) {
    const int64_t boundary = ((a.window + 1) * a.p.sizes.v_heads + task.head) * state_floats;
    state.store(a, a.boundaries + boundary, false, task.column());
  }
}

/// Gradients of states after the window's chunks, dU, dW and dV, and at a sequence's beginning that
/// of its initial state.
template <int kParts, int kMaxDim>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardCtas)
    d_states_kernel(const __grid_constant__ BackwardArgs a) {
  constexpr int kBlocks = kMaxDim / kChunk;
  if (!a.table.valid()) return;
  StateSmem& smem = begin_state_task(a);
  const StateTask& task = smem.task;
  // A sequence without chunks has a state all the same, and belongs to the first window.
  const bool is_empty = task.sequence.num_chunks() == 0;
  if (is_empty ? a.window != 0 : task.first >= task.end) return;
  const auto has_columns = [&] { return task.column() < dim_v(a); };
  const int64_t state_floats = int64_t{dim_k(a)} * dim_v(a);

  StateRows<kParts, kMaxDim> d_state;
  if (has_columns()) {
    if (is_empty || task.end == task.sequence.num_chunks()) {
      d_state.load(a, a.p.d_final_state == nullptr ? nullptr : a.p.d_final_state + task.state,
                   a.p.state_v_first, task.column());
    } else {
      d_state.load(a, a.d_boundaries[0] + task.head * state_floats, false, task.column());
    }
  }
  const auto block_of_step = [&](int step, Block& block) {
    // k; d_out; P; A; k; d_out; q.
    const int num_keys = blocks_of(dim_k(a)), per_chunk = 3 * num_keys + 4;
    const int64_t idx = task.end - 1 - step / per_chunk;
    const int i = step % per_chunk;
    if (idx < task.first) return false;
    if (i == num_keys || i == 2 * num_keys + 3) {
      block = token_block(a, a.d_out, task.chunk(idx), a.p.sizes.v_heads, task.head, dim_v(a),
                          task.slice);
    } else if (i == num_keys + 1 || i == num_keys + 2) {
      block = square_block(i == num_keys + 1 ? a.p_scores : a.a, task.index(a, idx));
    } else {
      const int before = i < num_keys ? 0 : i < 2 * num_keys + 3 ? num_keys + 3 : 2 * num_keys + 4;
      block =
          key_block(a, i < 2 * num_keys + 3 ? a.k : a.q, task.chunk(idx), task.k_head, i - before);
    }
    return true;
  };
  Ring<kBackwardStateSlots, 2, decltype(block_of_step)> ring(smem.slots[0], block_of_step);
  for (int done = 0; task.end - 1 - done >= task.first; ++done) {
    const auto idx = [&] { return task.end - 1 - done; };
    const auto index = [&] { return task.index(a, idx()); };
    if (has_columns()) {
      d_state.keep(a, a.d_state + index() * dim_k(a) * dim_v(a), task.column());
    }
    Rows dw;  // K dS, then dU, then dW, in the same place
    clear(dw);
    for_each_constant<kBlocks>([&](auto block) {
      if (block() * kChunk >= dim_k(a)) return;
      const float* const k = ring.next();
      if (has_columns()) d_state.template read<block()>(dw, k, tiles_in(dim_k(a), block()));
    });
    const float* const d_out = ring.next();
    const float* square = ring.next();
    if (has_columns()) {
      const TokenScalars& tokens = a.tokens[index()];
      each_value(dw, 0, 0, [&](float& x, int token, int) { x *= tokens.rest[token]; });
      multiply_tiles<kParts, RowsAre::kInner>(
          dw, [&](int n, Tile& tile) { read_values(d_out, n, tile); }, square, kTiles, kTiles);
      store_values(a, a.du, index(), task, dw);
    }
    square = ring.next();
    if (has_columns()) {
      multiply_triangle<kParts, RowsAre::kInner>(dw, square);
      store_values(a, a.dw, index(), task, dw);
      const TokenScalars& tokens = a.tokens[index()];
      const Chunk chunk = task.chunk(idx());
      const int64_t heads = a.p.sizes.v_heads;
      const int64_t first = chunk.batch_idx * a.p.sizes.num_tokens + chunk.begin;
      each_value(dw, 0, 0, [&](float& x, int token, int channel) {
        if (token < chunk.num_tokens) {
          store_element(a.p.dv,
                        ((first + token) * heads + task.head) * dim_v(a) + task.column() + channel,
                        x);
        }
        x *= -tokens.exp_G[token];
      });
      d_state.scale(tokens.exp_G[kChunk - 1]);
    }
    for_each_constant<kBlocks>([&](auto block) {
      if (block() * kChunk >= dim_k(a)) return;
      const float* const k = ring.next();
      if (has_columns()) d_state.template write<block()>(dw, k, tiles_in(dim_k(a), block()));
    });
    square = ring.next();
    if (has_columns()) {
      const TokenScalars& tokens = a.tokens[index()];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) read_values(square, n, dw[n]);
      each_value(dw, 0, 0, [&](float& x, int token, int) { x *= a.p.scale * tokens.exp_G[token]; });
    }
    for_each_constant<kBlocks>([&](auto block) {
      if (block() * kChunk >= dim_k(a)) return;
      const float* const q = ring.next();
      if (has_columns()) d_state.template write<block()>(dw, q, tiles_in(dim_k(a), block()));
    });
  }
  cp_async_wait<0>();
  if (!has_columns()) return;
  if (!is_empty && task.first > 0) {
    d_state.store(a, a.d_boundaries[1] + task.head * state_floats, false, task.column());
  } else if (a.p.d_initial_state != nullptr) {
    d_state.store(a, a.p.d_initial_state + task.state, a.p.state_v_first, task.column());
  }
}

}  // namespace kvcore::gdn::backward
