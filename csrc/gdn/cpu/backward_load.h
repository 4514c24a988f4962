// The backward's way into a chunk: its tokens, gates and scores, and the states before it. For code
// that is compiled per ISA level.
#pragma once

#include "gdn/cpu/operands.h"
#include "gdn/cpu/solve.h"

namespace kvcore::gdn::KVCORE_ISA {

/// One chunk of a task.
struct Chunk {
  int64_t begin;  // within the sequence
  int n, rows;
};

inline Chunk chunk_at(const BackwardTask& task, int64_t index) {
  const int64_t begin = index * kChunk, left = task.sequence.length - begin;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);
  return {begin, n, (n + kProductMultiple - 1) / kProductMultiple * kProductMultiple};
}

inline int64_t token_of(const ChunkScanBackwardParams& p, const BackwardTask& task, int64_t token) {
  return task.sequence.batch_idx * p.sizes.num_tokens + task.sequence.begin + token;
}

inline int64_t k_head_of(const ChunkScanBackwardParams& p, const BackwardTask& task) {
  return task.head / (p.sizes.v_heads / p.sizes.k_heads);
}

/// The chunk's rows of an input.
template <class T>
inline void load_chunk_rows(const InputView& x, const BackwardTask& task, int64_t head,
                            const Chunk& chunk, int dim, T* rows) {
  load_rows(x, task.sequence.batch_idx, head, task.sequence.begin + chunk.begin, chunk.n,
            chunk.rows, dim, rows);
}

/// rstd of q (which = 0) or k of one token, 1 without a norm.
inline float rstd_of(const ChunkScanBackwardParams& p, const BackwardTask& task, int which,
                     int64_t token) {
  if (!p.qk_l2norm) return 1.0f;
  const int64_t row = which * p.sizes.batch * p.sizes.num_tokens + token_of(p, task, token);
  return p.rstd[row * p.sizes.k_heads + k_head_of(p, task)];
}

/// Value channels of the task.
inline int columns_of(const BackwardTask& task) { return task.v_end - task.v_begin; }

/// Columns of a state to another of the same stride.
inline void copy_columns(const float* state, int k_dim, int columns, int stride, float* out) {
  for (int i = 0; i < k_dim; ++i) {
    memcpy(out + i * stride, state + i * stride, columns * sizeof(float));
  }
}

/// k, v, gates, X, A and W = V - e^G (K S), U = A W: what both passes need.
template <class Operand>
inline void load_chunk(const ChunkScanBackwardParams& p, const BackwardTask& task,
                       const Chunk& chunk, float* state, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = columns_of(task);
  const int rows = chunk.rows, stride = state_stride(static_cast<int>(p.sizes.v_dim));
  load_chunk_rows(p.k, task, k_head_of(p, task), chunk, k_dim, L::values(w.k));
  load_chunk_rows(channels_from(p.v, task.v_begin), task, task.head, chunk, columns, w.v);
  auto* const pairs = second_operand<Operand>(w.k, rows, k_dim, w.k_pairs);
  by_channel<Operand>(pairs, rows, k_dim, w.k_by_channel);
  TokenValues& t = w.tokens;
  for (int i = 0; i < chunk.n; ++i) {
    const int64_t token = chunk.begin + i, at = token_of(p, task, token);
    t.k_factor[i] = rstd_of(p, task, 1, token);
    t.q_factor[i] = rstd_of(p, task, 0, token);
    t.G[i] = p.g_cumsum[at * p.sizes.v_heads + task.head];
    t.beta[i] =
        write_strength(p.gate, task.sequence.batch_idx, task.head, task.sequence.begin + token);
  }
  fill_decays(t, chunk.n, rows);
  for (int i = 0; i < rows; ++i) {
    float* const x = w.x + i * kSquareStride;
    if (i < chunk.n) {
      const int64_t at = token_of(p, task, chunk.begin + i) * p.sizes.v_heads + task.head;
      memcpy(x, p.x_inverse + at * kChunk, kChunk * sizeof(float));
    } else {
      zero_row(x, kChunk);
      x[i] = 1.0f;
    }
    for (int j = 0; j < rows; j += kLanes) {
      const Mask past = up_to(j, i);
      F32 decay = splat(0.0f);
      if (j <= i) {
        const F32 log = select(past, splat(t.G[i]) - load(t.G + j), splat(0.0f));
        decay = select(past, exp_any(log), splat(0.0f));
      }
      store(w.decay + i * kSquareStride + j, decay);
      store(w.a + i * kSquareStride + j, load(x + j) * decay * load(t.beta + j));
    }
  }
  const auto* const s = state_operand<Operand>(state, k_dim, columns, stride, w.packed);
  product<Operand, L::kRow, 1>(L::of(w.k), s, stride, w.ks, kRowStride, rows, columns, k_dim);
  for (int i = 0; i < rows; ++i) {
    const F32 read = splat(-t.exp_G[i] * t.k_factor[i]);
    for (int c = i * kRowStride; c < i * kRowStride + columns; c += kLanes) {
      store(w.w + c, fma(read, load(w.ks + c), load(w.v + c)));
    }
  }
  product<Fp32Operand, kSquareStride, 1>(w.a, w.w, kRowStride, w.u, kRowStride, rows, columns, rows,
                                         Part::kLowerA);
}

/// The state after the chunk that load_chunk has loaded, in place or elsewhere.
template <class Operand>
inline void advance_state(const ChunkScanBackwardParams& p, const BackwardTask& task,
                          const Chunk& chunk, const float* state, float* next,
                          BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = columns_of(task);
  const int rows = chunk.rows, stride = state_stride(static_cast<int>(p.sizes.v_dim));
  float factors[kChunk];
  for (int i = 0; i < rows; ++i) factors[i] = w.tokens.rest[i] * w.tokens.k_factor[i];
  const auto* const written = second_operand<Operand>(w.u, rows, columns, factors, w.second);
  if (next != state) copy_columns(state, k_dim, columns, stride, next);
  product<Operand, kSquareStride, 1>(L::of(w.k_by_channel), written, kRowStride, next, stride,
                                     k_dim, columns, rows, Part::kAll,
                                     {&w.tokens.exp_G[chunk.n - 1], 0});
}

template <class T>
inline float row_dot(const T* a, const float* b, int n) {
  F32 sum = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

/// Scores of the chunk: P, and KK^T below the diagonal in kk.
template <class Operand>
inline void load_scores(const ChunkScanBackwardParams& p, const BackwardTask& task,
                        const Chunk& chunk, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), rows = chunk.rows;
  const TokenValues& t = w.tokens;
  load_chunk_rows(p.q, task, k_head_of(p, task), chunk, k_dim, L::values(w.q));
  auto* const pairs = second_operand<Operand>(w.q, rows, k_dim, w.q_pairs);
  by_channel<Operand>(pairs, rows, k_dim, w.q_by_channel);
  const auto* const k_transposed =
      transposed_operand<Operand>(L::of(w.k), L::kRow, rows, k_dim, w.k_transposed, kSquareStride);
  product<Operand, L::kRow, 1>(L::of(w.k), k_transposed, kSquareStride, w.kk, kSquareStride, rows,
                               rows, k_dim, Part::kLowerC);
  product<Operand, L::kRow, 1>(L::of(w.q), k_transposed, kSquareStride, w.p, kSquareStride, rows,
                               rows, k_dim, Part::kLowerC);
  for (int i = 0; i < rows; ++i) {
    const F32 k_factor = splat(t.k_factor[i]), q_factor = splat(p.scale * t.q_factor[i]);
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const Mask past = up_to(j, i);
      const F32 factor = load(t.k_factor + j), zero = splat(0.0f);
      store(w.kk + at, select(past, load(w.kk + at) * k_factor * factor, zero));
      store(w.p + at, select(past, load(w.p + at) * q_factor * factor * load(w.decay + at), zero));
    }
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
