// Chunked gated delta rule, backward: single-threaded, compiled per ISA level. The numbers in
// comments are those of the equations in csrc/gdn/README.md. All products are fp32.
#include "gdn/cpu/solve.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// One chunk of a task.
struct Chunk {
  int64_t begin;  // within the sequence
  int n, rows;
};

Chunk chunk_at(const BackwardTask& task, int64_t index) {
  const int64_t begin = index * kChunk, left = task.sequence.length - begin;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);
  return {begin, n, (n + kProductMultiple - 1) / kProductMultiple * kProductMultiple};
}

int64_t token_of(const ChunkScanBackwardParams& p, const BackwardTask& task, int64_t token) {
  return task.sequence.batch_idx * p.sizes.num_tokens + task.sequence.begin + token;
}

int64_t k_head_of(const ChunkScanBackwardParams& p, const BackwardTask& task) {
  return task.head / (p.sizes.v_heads / p.sizes.k_heads);
}

void load_rows(const InputView& x, const BackwardTask& task, int64_t head, const Chunk& chunk,
               int dim, float* rows) {
  for (int i = 0; i < chunk.rows; ++i) {
    float* const row = rows + i * kRowStride;
    if (i < chunk.n) {
      widen_row(x, task.sequence.batch_idx, head, task.sequence.begin + chunk.begin + i, dim, row);
    } else {
      zero_row(row, dim);
    }
  }
}

/// rstd of q (which = 0) or k of one token.
float rstd_of(const ChunkScanBackwardParams& p, const BackwardTask& task, int which,
              int64_t token) {
  const int64_t row = which * p.sizes.batch * p.sizes.num_tokens + token_of(p, task, token);
  return p.rstd[row * p.sizes.k_heads + k_head_of(p, task)];
}

/// k, v, gates, X, A and W = V - e^G (K S), U = A W: what both passes need.
void load_chunk(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                const float* state, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int rows = chunk.rows;
  load_rows(p.k, task, k_head_of(p, task), chunk, k_dim, w.k);
  load_rows(p.v, task, task.head, chunk, v_dim, w.v);
  TokenValues& t = w.tokens;
  for (int i = 0; i < chunk.n; ++i) {
    const int64_t token = chunk.begin + i, at = token_of(p, task, token);
    if (p.qk_l2norm) {
      scale_row(w.k + i * kRowStride, rstd_of(p, task, 1, token), k_dim, w.k + i * kRowStride);
    }
    t.G[i] = p.g_cumsum[at * p.sizes.v_heads + task.head];
    t.beta[i] =
        write_strength(p.gate, task.sequence.batch_idx, task.head, task.sequence.begin + token);
    t.q_factor[i] = t.k_factor[i] = 1.0f;
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
      const F32 log = select(past, splat(t.G[i]) - load(t.G + j), splat(0.0f));
      const F32 decay = select(past, exp_any(log), splat(0.0f));
      store(w.decay + i * kSquareStride + j, decay);
      store(w.a + i * kSquareStride + j, load(x + j) * decay * load(t.beta + j));
    }
  }
  product<Fp32Operand, kRowStride, 1>(w.k, state, v_dim, w.ks, kRowStride, rows, v_dim, k_dim);
  for (int i = 0; i < rows; ++i) {
    const F32 read = splat(-t.exp_G[i]);
    for (int c = i * kRowStride; c < i * kRowStride + v_dim; c += kLanes) {
      store(w.w + c, fma(read, load(w.ks + c), load(w.v + c)));
    }
  }
  product<Fp32Operand, kSquareStride, 1>(w.a, w.w, kRowStride, w.u, kRowStride, rows, v_dim, rows,
                                         Part::kLowerA);
}

/// The state after the chunk that load_chunk has loaded; u is scaled away.
void advance_state(const ChunkScanBackwardParams& p, const Chunk& chunk, const float* state,
                   float* next, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  for (int i = 0; i < chunk.rows; ++i) {
    scale_row(w.u + i * kRowStride, w.tokens.rest[i], v_dim, w.u + i * kRowStride);
  }
  if (next != state) memcpy(next, state, sizeof(float) * k_dim * v_dim);
  product<Fp32Operand, 1, kRowStride>(w.k, w.u, kRowStride, next, v_dim, k_dim, v_dim, chunk.rows,
                                      Part::kAll, true, w.tokens.exp_G[chunk.n - 1]);
}

float row_dot(const float* a, const float* b, int n) {
  F32 sum = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

/// Scores of the chunk: P, and KK^T in kk.
void load_scores(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                 BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), rows = chunk.rows;
  load_rows(p.q, task, k_head_of(p, task), chunk, k_dim, w.q);
  for (int i = 0; p.qk_l2norm && i < chunk.n; ++i) {
    scale_row(w.q + i * kRowStride, rstd_of(p, task, 0, chunk.begin + i), k_dim,
              w.q + i * kRowStride);
  }
  transpose(w.k, kRowStride, rows, k_dim, w.transposed, kSquareStride);
  product<Fp32Operand, kRowStride, 1>(w.k, w.transposed, kSquareStride, w.kk, kSquareStride, rows,
                                      rows, k_dim);
  product<Fp32Operand, kRowStride, 1>(w.q, w.transposed, kSquareStride, w.p, kSquareStride, rows,
                                      rows, k_dim, Part::kLowerC);
  const F32 scale = splat(p.scale);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < rows; j += kLanes) {
      const int at = i * kSquareStride + j;
      const Mask past = up_to(j, i);
      store(w.p + at, select(past, load(w.p + at) * scale * load(w.decay + at), splat(0.0f)));
    }
  }
}

/// 1: dU, dW, dA, dP and Y; dV is dW.
void backward_values(const ChunkScanBackwardParams& p, const Chunk& chunk, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int rows = chunk.rows;
  product<Fp32Operand, kRowStride, 1>(w.k, w.d_state, v_dim, w.du, kRowStride, rows, v_dim, k_dim);
  for (int i = 0; i < rows; ++i) {
    scale_row(w.du + i * kRowStride, w.tokens.rest[i], v_dim, w.du + i * kRowStride);
  }
  product<Fp32Operand, 1, kSquareStride>(w.p, w.d_out, kRowStride, w.du, kRowStride, rows, v_dim,
                                         rows, Part::kUpperA, true);
  product<Fp32Operand, 1, kSquareStride>(w.a, w.du, kRowStride, w.dw, kRowStride, rows, v_dim, rows,
                                         Part::kUpperA);
  transpose(w.w, kRowStride, rows, v_dim, w.transposed, kSquareStride);
  product<Fp32Operand, kRowStride, 1>(w.du, w.transposed, kSquareStride, w.da, kSquareStride, rows,
                                      rows, v_dim, Part::kLowerC);
  transpose(w.u, kRowStride, rows, v_dim, w.transposed, kSquareStride);
  product<Fp32Operand, kRowStride, 1>(w.d_out, w.transposed, kSquareStride, w.dp, kSquareStride,
                                      rows, rows, v_dim, Part::kLowerC);
  for (int i = 0; i < rows; ++i) {
    scale_row(w.dw + i * kRowStride, -w.tokens.exp_G[i], v_dim, w.y + i * kRowStride);
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

/// 2, 3, and the parts of 5 and 6 that come from rows: dQ, dK, dG.
void backward_keys(const ChunkScanBackwardParams& p, const Chunk& chunk, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int rows = chunk.rows, last = chunk.n - 1;
  const TokenValues& t = w.tokens;
  product<Fp32Operand, kRowStride, 1>(w.d_out, w.state_transposed, k_dim, w.dq, kRowStride, rows,
                                      k_dim, v_dim);
  product<Fp32Operand, kRowStride, 1>(w.u, w.d_state_transposed, k_dim, w.dk, kRowStride, rows,
                                      k_dim, v_dim);
  float kept = 0.0f;
  for (int i = 0; i < rows; ++i) {
    const int at = i * kRowStride;
    scale_row(w.dq + at, p.scale * t.exp_G[i], k_dim, w.dq + at);
    scale_row(w.dk + at, t.rest[i], k_dim, w.dk + at);
    const float written = row_dot(w.k + at, w.dk + at, k_dim);
    kept += written;
    w.dG[i] = row_dot(w.q + at, w.dq + at, k_dim) + row_dot(w.y + at, w.ks + at, v_dim) - written;
  }
  backward_decays(chunk, w);
  F32 products = splat(0.0f);
  for (int i = 0; i < k_dim * v_dim; i += kLanes) {
    products = fma(load(w.state + i), load(w.d_state + i), products);
  }
  w.dG[last] += t.exp_G[last] * reduce_add(products) + kept;

  const F32 scale = splat(p.scale);
  for (int i = 0; i < rows; ++i) {
    for (int at = i * kSquareStride; at < i * kSquareStride + rows; at += kLanes) {
      store(w.dp + at, load(w.dp + at) * scale * load(w.decay + at));
    }
  }
  product<Fp32Operand, kSquareStride, 1>(w.dp, w.k, kRowStride, w.dq, kRowStride, rows, k_dim, rows,
                                         Part::kLowerA, true);
  product<Fp32Operand, kRowStride, 1>(w.y, w.state_transposed, k_dim, w.dk, kRowStride, rows, k_dim,
                                      v_dim, Part::kAll, true);
  product<Fp32Operand, 1, kSquareStride>(w.dp, w.q, kRowStride, w.dk, kRowStride, rows, k_dim, rows,
                                         Part::kUpperA, true);
  product<Fp32Operand, kSquareStride, 1>(w.e, w.k, kRowStride, w.dk, kRowStride, rows, k_dim, rows,
                                         Part::kAll, true);
}

/// 7: d_state before the chunk.
void backward_state(const ChunkScanBackwardParams& p, const Chunk& chunk, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const int rows = chunk.rows;
  product<Fp32Operand, 1, kRowStride>(w.k, w.y, kRowStride, w.d_state, v_dim, k_dim, v_dim, rows,
                                      Part::kAll, true, w.tokens.exp_G[chunk.n - 1]);
  for (int i = 0; i < rows; ++i) {
    scale_row(w.d_out + i * kRowStride, p.scale * w.tokens.exp_G[i], v_dim,
              w.d_out + i * kRowStride);
  }
  product<Fp32Operand, 1, kRowStride>(w.q, w.d_out, kRowStride, w.d_state, v_dim, k_dim, v_dim,
                                      rows, Part::kAll, true);
}

/// Adds the rows to the group's sums; the last head of the group undoes the norm and writes them.
void store_keys(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                int which, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  float* const rows = which == 0 ? w.dq : w.dk;
  const float* const given = which == 0 ? w.q : w.k;
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
      const float* const y = given + i * kRowStride;
      const F32 along = splat(-row_dot(y, row, k_dim));
      const F32 rstd = splat(rstd_of(p, task, which, token));
      for (int c = 0; c < k_dim; c += kLanes) {
        store(row + c, rstd * fma(along, load(y + c), load(row + c)));
      }
    }
    narrow_row(row, k_dim, which == 0 ? p.dq : p.dk,
               (token_of(p, task, token) * p.sizes.k_heads + k_head_of(p, task)) * p.sizes.k_dim);
  }
}

/// 6 and 8: dg, dbeta and the gate's parameters; dv.
void store_tokens(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                  BackwardWorkspace& w) {
  const int v_dim = static_cast<int>(p.sizes.v_dim);
  const Gate& gate = p.gate;
  float dg = 0.0f;
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
      *task.dA_log += dg * rate * softplus(x);
      *task.ddt_bias += d_gate;
    }
    float d_beta = w.dbeta[i];
    if (gate.beta_sigmoid) {
      const float y = w.tokens.beta[i] / gate.beta_scale;
      d_beta *= gate.beta_scale * y * (1.0f - y);
    }
    narrow_row(&d_gate, 1, p.dg, at);
    narrow_row(&d_beta, 1, p.dbeta, at);
    narrow_row(w.dw + i * kRowStride, v_dim, p.dv, at * v_dim);
  }
}

void backward_chunk(const ChunkScanBackwardParams& p, const BackwardTask& task, const Chunk& chunk,
                    const float* state, BackwardWorkspace& w) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  memcpy(w.state, state, sizeof(float) * k_dim * v_dim);
  load_chunk(p, task, chunk, w.state, w);
  load_scores(p, task, chunk, w);
  load_rows(p.d_out, task, task.head, chunk, v_dim, w.d_out);
  transpose(w.state, v_dim, k_dim, v_dim, w.state_transposed, k_dim);
  transpose(w.d_state, v_dim, k_dim, v_dim, w.d_state_transposed, k_dim);
  backward_values(p, chunk, w);
  backward_inverse(chunk, w);
  backward_keys(p, chunk, w);
  backward_state(p, chunk, w);
  store_keys(p, task, chunk, 0, w);
  store_keys(p, task, chunk, 1, w);
  store_tokens(p, task, chunk, w);
}

}  // namespace

void chunk_scan_backward_kernel(const ChunkScanBackwardParams& p, const BackwardTask& task,
                                BackwardWorkspace& w) {
  const Sizes& s = p.sizes;
  const int k_dim = static_cast<int>(s.k_dim), v_dim = static_cast<int>(s.v_dim);
  const int64_t size = s.k_dim * s.v_dim;
  const int64_t at = (task.sequence.seq_idx * s.v_heads + task.head) * size;
  const int64_t num_chunks = (task.sequence.length + kChunk - 1) / kChunk;
  const int64_t num_segments = (num_chunks + kSegmentChunks - 1) / kSegmentChunks;

  load_state(p.initial_state ? p.initial_state + at : nullptr, p.state_v_first, k_dim, v_dim, 0,
             v_dim, w.state);
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    memcpy(task.segments + segment * size, w.state, sizeof(float) * size);
    if (segment + 1 == num_segments) break;
    for (int64_t i = 0; i < kSegmentChunks; ++i) {
      const Chunk chunk = chunk_at(task, segment * kSegmentChunks + i);
      load_chunk(p, task, chunk, w.state, w);
      advance_state(p, chunk, w.state, w.state, w);
    }
  }
  load_state(p.d_final_state ? p.d_final_state + at : nullptr, p.state_v_first, k_dim, v_dim, 0,
             v_dim, w.d_state);
  for (int64_t segment = num_segments - 1; segment >= 0; --segment) {
    const int64_t first = segment * kSegmentChunks, left = num_chunks - first;
    const int64_t count = left < kSegmentChunks ? left : kSegmentChunks;
    memcpy(task.states, task.segments + segment * size, sizeof(float) * size);
    for (int64_t i = 0; i + 1 < count; ++i) {
      const Chunk chunk = chunk_at(task, first + i);
      load_chunk(p, task, chunk, task.states + i * size, w);
      advance_state(p, chunk, task.states + i * size, task.states + (i + 1) * size, w);
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      backward_chunk(p, task, chunk_at(task, first + i), task.states + i * size, w);
    }
  }
  if (p.d_initial_state != nullptr) {
    store_state(w.d_state, p.state_v_first, k_dim, v_dim, 0, v_dim, p.d_initial_state + at);
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
