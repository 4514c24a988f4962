// Chunked gated delta rule, backward: single-threaded, compiled per ISA level. The numbers in
// comments are those of the equations in csrc/gdn/README.md.
#include "gdn/cpu/backward_load.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// 1: dU, dW, which is dV, and Y = -e^G dW, of the task's value channels.
template <class Operand>
void backward_writes(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                     float* d_state, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = columns_of(task);
  const int rows = chunk.rows, stride = state_stride(static_cast<int>(p.sizes.v_dim));
  const TokenValues& t = w.tokens;
  load_chunk_rows(channels_from(p.d_out, task.v_begin), task, task.head, chunk, columns, w.d_out);
  const auto* const ds = state_operand<Operand>(d_state, k_dim, columns, stride, w.packed);
  product<Operand, L::kRow, 1>(L::of(w.k), ds, stride, w.du, kRowStride, rows, columns, k_dim);
  float factors[kChunk];
  for (int i = 0; i < rows; ++i) factors[i] = t.rest[i] * t.k_factor[i];
  product<Fp32Operand, 1, kSquareStride>(w.p, w.d_out, kRowStride, w.du, kRowStride, rows, columns,
                                         rows, Part::kUpperA, {factors});
  product<Fp32Operand, 1, kSquareStride>(w.a, w.du, kRowStride, w.dw, kRowStride, rows, columns,
                                         rows, Part::kUpperA);
  for (int i = 0; i < rows; ++i) {
    scale_row(w.dw + i * kRowStride, -t.exp_G[i], columns, w.y + i * kRowStride);
  }
}

/// 1: dA and dP.
template <class Operand>
void backward_squares(const ChunkScanBackwardParams& p, const BackwardTask& task,
                      const Chunk& chunk, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int v_dim = static_cast<int>(p.sizes.v_dim), rows = chunk.rows;
  if constexpr (Operand::kPack == 2) {
    load_chunk_rows(p.d_out, task, task.head, chunk, v_dim, L::values(w.d_out_given));
  }
  const auto* const d_out = L::of(Operand::kPack == 2 ? w.d_out_given : w.d_out);
  const auto* b =
      transposed_operand<Operand>(first_operand<Operand>(w.w, kRowStride, rows, v_dim, w.first),
                                  L::kRow, rows, v_dim, w.transposed, kSquareStride);
  product<Operand, L::kRow, 1>(first_operand<Operand>(w.du, kRowStride, rows, v_dim, w.first), b,
                               kSquareStride, w.da, kSquareStride, rows, rows, v_dim,
                               Part::kLowerC);
  b = transposed_operand<Operand>(first_operand<Operand>(w.u, kRowStride, rows, v_dim, w.u_first),
                                  L::kRow, rows, v_dim, w.transposed, kSquareStride);
  product<Operand, L::kRow, 1>(d_out, b, kSquareStride, w.dp, kSquareStride, rows, rows, v_dim,
                               Part::kLowerC);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const Mask past = up_to(j, i);
      store(w.da + at, select(past, load(w.da + at), splat(0.0f)));
      store(w.dp + at, select(past, load(w.dp + at), splat(0.0f)));
    }
  }
}

/// The part of 5 that comes from Z = P * dP + A * dA: rowsum - colsum.
void backward_decays(const Chunk& chunk, BackwardWorkspace& w) {
  const int rows = chunk.rows;
  alignas(64) float columns[kChunk] = {};
  for (int i = 0; i < rows; ++i) {
    F32 sum = splat(0.0f);
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const F32 z = load(w.p + at) * load(w.dp + at) + load(w.a + at) * load(w.da + at);
      sum = sum + z;
      store(columns + j, load(columns + j) + z);
    }
    w.dG[i] += reduce_add(sum);
  }
  for (int i = 0; i < rows; ++i) w.dG[i] -= columns[i];
}

/// 4: dbeta, and N + N^T in e.
void backward_inverse(const Chunk& chunk, BackwardWorkspace& w) {
  const int rows = chunk.rows;
  const TokenValues& t = w.tokens;
  alignas(64) float dbeta[kChunk] = {};
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const F32 dx = load(w.da + at) * load(w.decay + at);
      store(w.e + at, dx * load(t.beta + j));
      store(dbeta + j, fma(load(w.x + at), dx, load(dbeta + j)));
    }
  }
  transpose(w.x, kSquareStride, rows, rows, w.x_transposed, kSquareStride);
  product<Fp32Operand, kSquareStride, 1>(w.e, w.x_transposed, kSquareStride, w.f, kSquareStride,
                                         rows, rows, rows, Part::kLowerA);
  product<Fp32Operand, 1, kSquareStride>(w.x, w.f, kSquareStride, w.e, kSquareStride, rows, rows,
                                         rows, Part::kUpperA);
  for (int i = 0; i < rows; ++i) {
    F32 sum = splat(0.0f);
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const F32 dl = select(up_to(j, i - 1), splat(0.0f) - load(w.e + at), splat(0.0f));
      sum = fma(dl, load(w.kk + at), sum);
      store(w.e + at, dl * splat(t.beta[i]));
    }
    w.dbeta[i] = dbeta[i] + reduce_add(sum);
  }
  transpose(w.e, kSquareStride, rows, rows, w.f, kSquareStride);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      store(w.e + at, load(w.e + at) + load(w.f + at));
    }
  }
}

/// Y x [tokens, channels] += S B, S a square whose columns are given factors first.
template <class Operand>
void add_square(const float* square, const float* factors, const typename Operand::Element* b,
                int rows, int dim, Part part, float* y, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  for (int i = 0; i < rows; ++i) {
    for (int at = i * kSquareStride, j = 0; j < rows; j += kLanes) {
      store(w.square + at + j, load(square + at + j) * load(factors + j));
    }
  }
  product<Operand, L::kSquare, 1>(
      first_operand<Operand>(w.square, kSquareStride, rows, rows, w.first), b, kRowStride, y,
      kRowStride, rows, dim, rows, part, kOntoC);
}

/// A state transposed: a second operand whose inner index is that of the value channels.
template <class Operand>
auto* transposed_state(float* state, int k_dim, int v_dim, BackwardWorkspace& w) {
  const int stride = state_stride(v_dim);
  return transposed_operand<Operand>(first_operand<Operand>(state, stride, k_dim, v_dim, w.packed),
                                     stride / Operand::kPack, k_dim, v_dim, w.transposed_state,
                                     state_stride(k_dim));
}

/// 2, 3, and the parts of 5 and 6 that come from rows: dQ, dK (of normalized q and k), dG.
template <class Operand>
void backward_keys(const ChunkScanBackwardParams& p, const Chunk& chunk, float* state,
                   float* d_state, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int rows = chunk.rows, last = chunk.n - 1, stride = state_stride(k_dim);
  const TokenValues& t = w.tokens;
  const auto* s = transposed_state<Operand>(d_state, k_dim, v_dim, w);
  // Made with dP's second operand.
  const auto* const u = L::of(Operand::kPack == 2 ? w.u_first : w.u);
  const auto* const d_out = L::of(Operand::kPack == 2 ? w.d_out_given : w.d_out);
  product<Operand, L::kRow, 1>(u, s, stride, w.dk, kRowStride, rows, k_dim, v_dim);
  s = transposed_state<Operand>(state, k_dim, v_dim, w);
  product<Operand, L::kRow, 1>(d_out, s, stride, w.dq, kRowStride, rows, k_dim, v_dim);
  float kept = 0.0f;
  for (int i = 0; i < rows; ++i) {
    const int at = i * kRowStride;
    scale_row(w.dq + at, p.scale * t.exp_G[i], k_dim, w.dq + at);
    scale_row(w.dk + at, t.rest[i], k_dim, w.dk + at);
    const float written = t.k_factor[i] * row_dot(L::values(w.k) + at, w.dk + at, k_dim);
    kept += written;
    w.dG[i] = t.q_factor[i] * row_dot(L::values(w.q) + at, w.dq + at, k_dim) +
              t.k_factor[i] * row_dot(w.y + at, w.ks + at, v_dim) - written;
  }
  backward_decays(chunk, w);
  F32 products = splat(0.0f);
  for (int i = 0; i < k_dim; ++i) {
    for (int at = i * state_stride(v_dim), c = 0; c < v_dim; c += kLanes) {
      products = fma(load(state + at + c), load(d_state + at + c), products);
    }
  }
  w.dG[last] += t.exp_G[last] * reduce_add(products) + kept;

  const F32 scale = splat(p.scale);
  for (int i = 0; i < rows; ++i) {
    for (int at = i * kSquareStride; at < i * kSquareStride + rows; at += kLanes) {
      store(w.dp + at, load(w.dp + at) * scale * load(w.decay + at));
    }
  }
  const auto* const q = L::of(Operand::kPack == 2 ? w.q_pairs : w.q);
  const auto* const k = L::of(Operand::kPack == 2 ? w.k_pairs : w.k);
  product<Operand, L::kRow, 1>(first_operand<Operand>(w.y, kRowStride, rows, v_dim, w.first), s,
                               stride, w.dk, kRowStride, rows, k_dim, v_dim, Part::kAll, kOntoC);
  add_square<Operand>(w.dp, t.k_factor, k, rows, k_dim, Part::kLowerA, w.dq, w);
  transpose(w.dp, kSquareStride, rows, rows, w.f, kSquareStride);
  add_square<Operand>(w.f, t.q_factor, q, rows, k_dim, Part::kUpperA, w.dk, w);
  add_square<Operand>(w.e, t.k_factor, k, rows, k_dim, Part::kAll, w.dk, w);
}

/// 7: d_state before the chunk, in place.
template <class Operand>
void backward_state(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                    float* d_state, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = columns_of(task);
  const int rows = chunk.rows, stride = state_stride(static_cast<int>(p.sizes.v_dim));
  const TokenValues& t = w.tokens;
  float factors[kChunk];
  for (int i = 0; i < rows; ++i) factors[i] = p.scale * t.exp_G[i] * t.q_factor[i];
  product<Operand, kSquareStride, 1>(
      L::of(w.k_by_channel), second_operand<Operand>(w.y, rows, columns, t.k_factor, w.second),
      kRowStride, d_state, stride, k_dim, columns, rows, Part::kAll, {&t.exp_G[chunk.n - 1], 0});
  product<Operand, kSquareStride, 1>(
      L::of(w.q_by_channel), second_operand<Operand>(w.d_out, rows, columns, factors, w.second),
      kRowStride, d_state, stride, k_dim, columns, rows, Part::kAll, kOntoC);
}

/// Adds the rows to the group's sums; the last head of the group undoes the norm and writes them.
template <class Operand>
void store_keys(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                int which, BackwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  float* const rows = which == 0 ? w.dq : w.dk;
  const auto* const given = L::values(which == 0 ? w.q : w.k);
  const float* const factors = which == 0 ? w.tokens.q_factor : w.tokens.k_factor;
  for (int i = 0; i < chunk.n; ++i) {
    float* const row = rows + i * kRowStride;
    const int64_t token = chunk.begin + i;
    if (task.dqk != nullptr) {
      float* const sum = task.dqk + (which * task.sequence.length + token) * k_dim;
      for (int c = 0; c < k_dim; c += kLanes) {
        const F32 total = task.first_of_group ? load(row + c) : load(sum + c) + load(row + c);
        store(task.last_of_group ? row + c : sum + c, total);
      }
    }
    if (!task.last_of_group) continue;
    if (p.qk_l2norm) {
      const auto* const y = given + i * kRowStride;  // times rstd
      const F32 rstd = splat(factors[i]);
      const F32 along = splat(-factors[i] * factors[i] * row_dot(y, row, k_dim));
      for (int c = 0; c < k_dim; c += kLanes) {
        store(row + c, rstd * fma(along, load(y + c), load(row + c)));
      }
    }
    store_row<Operand>(
        row, k_dim, which == 0 ? p.dq : p.dk,
        (token_of(p, task, token) * p.sizes.k_heads + k_head_of(p, task)) * p.sizes.k_dim);
  }
}

/// 6 and 8: dg, dbeta and the gate's parameters; dv.
template <class Operand>
void store_tokens(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                  BackwardWorkspace& w) {
  const int v_dim = static_cast<int>(p.sizes.v_dim);
  const Gate& gate = p.gate;
  float dg = 0.0f, dA_log = 0.0f, ddt_bias = 0.0f;
  for (int i = chunk.n - 1; i >= 0; --i) {
    const int64_t token = task.sequence.begin + chunk.begin + i;
    const int64_t at = token_of(p, task, chunk.begin + i) * p.sizes.v_heads + task.head;
    dg += w.dG[i];
    float d_gate = dg;
    if (gate.A_log != nullptr) {
      const float bias = gate.dt_bias ? gate.dt_bias[task.head] : 0.0f;
      const float x = scalar_at(gate.g, task.sequence.batch_idx, task.head, token) + bias;
      const float rate = -expf(gate.A_log[task.head]);
      d_gate = dg * rate * (x > kSoftplusThreshold ? 1.0f : sigmoid(x));
      dA_log += dg * rate * softplus(x);
      ddt_bias += d_gate;
    }
    float d_beta = w.dbeta[i];
    if (gate.beta_sigmoid) {
      const float y = w.tokens.beta[i] / gate.beta_scale;
      d_beta *= gate.beta_scale * y * (1.0f - y);
    }
    narrow_row(&d_gate, 1, p.dg, at);
    narrow_row(&d_beta, 1, p.dbeta, at);
    store_row<Operand>(w.dw + i * kRowStride, v_dim, p.dv, at * v_dim);
  }
  task.dA_log[chunk.begin / kChunk] = dA_log;
  task.ddt_bias[chunk.begin / kChunk] = ddt_bias;
}

/// Chunks of a segment: its first, and how many there are.
struct Segment {
  int64_t first, count;
};
Segment segment_at(const BackwardTask& task, int64_t index) {
  const int64_t first = index * kSegmentChunks, left = chunks_of(task.sequence) - first;
  return {first, left < kSegmentChunks ? left : kSegmentChunks};
}

int64_t state_size(const ChunkScanBackwardParams& p) {
  return p.sizes.k_dim * state_stride(static_cast<int>(p.sizes.v_dim));
}

/// A state of the task's sequence and head in what was given or is wanted.
int64_t given_state(const ChunkScanBackwardParams& p, const BackwardTask& task) {
  return (task.sequence.seq_idx * p.sizes.v_heads + task.head) * p.sizes.k_dim * p.sizes.v_dim;
}

/// States before all segments, and the last d_state.
template <class Operand>
void first_states(const ChunkScanBackwardParams& p, const BackwardTask& task,
                  BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int stride = state_stride(v_dim);
  const int64_t size = state_size(p), at = given_state(p, task);
  float* state = task.segments + task.v_begin;
  load_state(p.initial_state ? p.initial_state + at : nullptr, p.state_v_first, k_dim, v_dim,
             task.v_begin, task.v_end, state, stride);
  const int64_t last = segments_of(task.sequence) - 1;
  for (int64_t i = 0; i < last * kSegmentChunks; ++i) {
    if (i % kSegmentChunks == 0) {
      copy_columns(state, k_dim, columns_of(task), stride, state + size);
      state += size;
    }
    const Chunk chunk = chunk_at(task, i);
    load_chunk<Operand>(p, task, chunk, state, w);
    advance_state<Operand>(p, task, chunk, state, state, w);
  }
  load_state(p.d_final_state ? p.d_final_state + at : nullptr, p.state_v_first, k_dim, v_dim,
             task.v_begin, task.v_end, task.d_state + task.v_begin, stride);
}

/// States before all chunks of a segment, from the one before the first.
template <class Operand>
void segment_states(const ChunkScanBackwardParams& p, const BackwardTask& task, int64_t index,
                    BackwardWorkspace& w) {
  const Segment segment = segment_at(task, index);
  const int64_t size = state_size(p);
  copy_columns(task.segments + index * size + task.v_begin, static_cast<int>(p.sizes.k_dim),
               columns_of(task), state_stride(static_cast<int>(p.sizes.v_dim)),
               task.states + task.v_begin);
  for (int64_t i = 0; i + 1 < segment.count; ++i) {
    const Chunk chunk = chunk_at(task, segment.first + i);
    float* const state = task.states + i * size + task.v_begin;
    load_chunk<Operand>(p, task, chunk, state, w);
    advance_state<Operand>(p, task, chunk, state, state + size, w);
  }
}

/// Gradients of the states after all chunks of a segment, and of the one before the first.
template <class Operand>
void segment_d_states(const ChunkScanBackwardParams& p, const BackwardTask& task, int64_t index,
                      BackwardWorkspace& w) {
  const Segment segment = segment_at(task, index);
  const int64_t size = state_size(p);
  float* const d_state = task.d_state + task.v_begin;
  for (int64_t i = segment.count - 1; i >= 0; --i) {
    const Chunk chunk = chunk_at(task, segment.first + i);
    copy_columns(d_state, static_cast<int>(p.sizes.k_dim), columns_of(task),
                 state_stride(static_cast<int>(p.sizes.v_dim)),
                 task.d_states + i * size + task.v_begin);
    load_chunk<Operand>(p, task, chunk, task.states + i * size + task.v_begin, w);
    load_scores<Operand>(p, task, chunk, w);
    backward_writes<Operand>(p, task, chunk, d_state, w);
    backward_state<Operand>(p, task, chunk, d_state, w);
  }
}

/// All but d_state before the chunk, of all value channels.
template <class Operand>
void backward_chunk(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                    float* state, float* d_state, BackwardWorkspace& w) {
  load_chunk<Operand>(p, task, chunk, state, w);
  load_scores<Operand>(p, task, chunk, w);
  backward_writes<Operand>(p, task, chunk, d_state, w);
  backward_squares<Operand>(p, task, chunk, w);
  backward_inverse(chunk, w);
  backward_keys<Operand>(p, chunk, state, d_state, w);
  store_keys<Operand>(p, task, chunk, 0, w);
  store_keys<Operand>(p, task, chunk, 1, w);
  store_tokens<Operand>(p, task, chunk, w);
}

template <class Operand>
void run(const ChunkScanBackwardParams& p, const BackwardTask& task, const BackwardWork& work,
         BackwardWorkspace& w) {
  const int64_t size = state_size(p);
  const Segment segment = segment_at(task, work.segment);
  switch (work.step) {
    case BackwardStep::kFirstStates:
      return first_states<Operand>(p, task, w);
    case BackwardStep::kStates:
      return segment_states<Operand>(p, task, work.segment, w);
    case BackwardStep::kDStates:
      return segment_d_states<Operand>(p, task, work.segment, w);
    case BackwardStep::kChunk:
      return backward_chunk<Operand>(p, task, chunk_at(task, segment.first + work.chunk),
                                     task.states + work.chunk * size,
                                     task.d_states + work.chunk * size, w);
    case BackwardStep::kChunks:
      for (int64_t i = segment.count - 1; i >= 0; --i) {
        const Chunk chunk = chunk_at(task, segment.first + i);
        backward_chunk<Operand>(p, task, chunk, task.states + i * size, task.d_state, w);
        backward_state<Operand>(p, task, chunk, task.d_state, w);
      }
      return;
    case BackwardStep::kInitialState:
      if (p.d_initial_state == nullptr) return;
      const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
      return store_state(task.d_state + task.v_begin, state_stride(v_dim), p.state_v_first, k_dim,
                         v_dim, task.v_begin, task.v_end, p.d_initial_state + given_state(p, task));
  }
}

}  // namespace

void chunk_scan_backward_kernel(const ChunkScanBackwardParams& p, const BackwardTask& task,
                                const BackwardWork& work, BackwardWorkspace& w) {
#if defined(KVCORE_ISA_AVX512_BF16)
  // What else these products take is rounded to bf16 for them.
  if (p.q.dtype == Dtype::kBFloat16 && p.v.dtype == Dtype::kBFloat16) {
    begin_products();
    run<Bf16Operand>(p, task, work, w);
    return end_products();
  }
#endif
  run<Fp32Operand>(p, task, work, w);
}

}  // namespace kvcore::gdn::KVCORE_ISA
