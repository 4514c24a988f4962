// Chunked gated delta rule, forward: single-threaded, compiled per ISA level. The equations are
// those of csrc/gdn/README.md.
#include "gdn/cpu/operands.h"
#include "gdn/cpu/solve.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// One chunk of a sequence.
struct Chunk {
  int64_t begin;  // its first token, in the sequence's batch entry
  int n, rows;    // tokens, and whole groups of 16
};

Chunk chunk_from(const ScanTask& task, int64_t token) {
  const int64_t left = task.sequence.begin + task.sequence.length - token;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);
  return {token, n, (n + kProductMultiple - 1) / kProductMultiple * kProductMultiple};
}

/// Rows of q (which = 0) or k as given, and their factors. `save`: write their norms.
template <class T>
void load_factored(const ChunkScanParams& p, const ScanTask& task, const Chunk& chunk,
                   int64_t k_head, int which, bool save, T* rows, float* factors) {
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  const int64_t batch = task.sequence.batch_idx;
  load_rows(which == 0 ? p.q : p.k, batch, k_head, chunk.begin, chunk.n, chunk.rows, k_dim, rows);
  for (int i = 0; i < chunk.n; ++i) {
    factors[i] = which == 0 ? p.scale : 1.0f;
    if (!p.qk_l2norm) continue;
    const float rstd = norm_factor(rows + i * kRowStride, k_dim);
    factors[i] *= rstd;
    if (save) {
      const int64_t token = (which * p.sizes.batch + batch) * p.sizes.num_tokens + chunk.begin + i;
      p.rstd[token * p.sizes.k_heads + k_head] = rstd;
    }
  }
}

/// What depends on the chunk's keys and queries alone, for value head `head` and those behind it.
template <class Operand>
void load_keys(const ChunkScanParams& p, const ScanTask& task, const Chunk& chunk, int64_t head,
               ForwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), rows = chunk.rows;
  const int64_t group = p.sizes.v_heads / p.sizes.k_heads, k_head = head / group;
  const bool save = p.save_residuals && p.qk_l2norm && task.v_begin == 0 && head % group == 0;
  load_factored(p, task, chunk, k_head, 0, save, L::values(w.q), w.tokens.q_factor);
  load_factored(p, task, chunk, k_head, 1, save, L::values(w.k), w.tokens.k_factor);
  auto* const k = L::of(w.k);
  const auto* const k_transposed =
      transposed_operand<Operand>(k, L::kRow, rows, k_dim, w.k_transposed, kSquareStride);
  by_channel<Operand>(second_operand<Operand>(w.k, rows, k_dim, w.pairs), rows, k_dim,
                      w.k_by_channel);
  product<Operand, L::kRow, 1>(k, k_transposed, kSquareStride, w.kk, kSquareStride, rows, rows,
                               k_dim, Part::kLowerC);
  product<Operand, L::kRow, 1>(L::of(w.q), k_transposed, kSquareStride, w.qk, kSquareStride, rows,
                               rows, k_dim, Part::kLowerC);
}

/// Gates of a value head, X, A and P.
void solve(const ChunkScanParams& p, const ScanTask& task, const Chunk& chunk, int64_t head,
           ForwardWorkspace& w) {
  const int64_t batch = task.sequence.batch_idx;
  const bool save = p.save_residuals && task.v_begin == 0;
  const int64_t first = (batch * p.sizes.num_tokens + chunk.begin) * p.sizes.v_heads + head;
  float G = 0.0f;
  for (int i = 0; i < chunk.n; ++i) {
    G += log_decay(p.gate, batch, head, chunk.begin + i);
    w.tokens.G[i] = G;
    w.tokens.beta[i] = write_strength(p.gate, batch, head, chunk.begin + i);
    if (save) p.g_cumsum[first + i * p.sizes.v_heads] = G;
  }
  fill_decays(w.tokens, chunk.n, chunk.rows);
  invert(w.tokens, chunk.rows, w.kk, w.l, w.x);
  weigh(w.tokens, chunk.rows, w.x, w.qk, w.a, w.p);
  if (!save) return;
  for (int i = 0; i < chunk.n; ++i) {
    float* const target = p.x_inverse + (first + i * p.sizes.v_heads) * kChunk;
    const int end = filled_columns(i);
    memcpy(target, w.x + i * kSquareStride, end * sizeof(float));
    zero_row(target + end, kChunk - end);
  }
}

/// W = V - e^G (K S), from K S as given in w.
void subtract_read(const ChunkScanParams& p, const ScanTask& task, const Chunk& chunk, int64_t head,
                   ForwardWorkspace& w) {
  const int columns = task.v_end - task.v_begin;
  const InputView v = channels_from(p.v, task.v_begin);
  alignas(64) float row[kMaxHeadDim];
  for (int i = 0; i < chunk.rows; ++i) {
    float* const target = w.w + i * kRowStride;
    if (i >= chunk.n) {
      zero_row(target, columns);
      continue;
    }
    widen_row(v, task.sequence.batch_idx, head, chunk.begin + i, columns, row);
    const F32 read = splat(-w.tokens.exp_G[i] * w.tokens.k_factor[i]);
    for (int c = 0; c < columns; c += kLanes) {
      store(target + c, fma(read, load(target + c), load(row + c)));
    }
  }
}

/// Asks for the chunk's rows of an input, into the second-level cache: they mostly lie a multiple
/// of 4 KiB apart, and the first level has room for few of such.
void prefetch_rows(const InputView& x, const ScanTask& task, const Chunk& chunk, int64_t head,
                   int dim) {
  if (x.channel_stride != 1) return;
  const int64_t element_bytes = x.dtype == Dtype::kFloat32 ? 4 : 2;
  for (int i = 0; i < chunk.n; ++i) {
    const int64_t at = task.sequence.batch_idx * x.batch_stride + head * x.head_stride +
                       (chunk.begin + i) * x.token_stride;
    const char* const row = static_cast<const char*>(x.data) + at * element_bytes;
    for (int64_t line = 0; line < dim * element_bytes; line += kLineBytes) {
      __builtin_prefetch(row + line, 0, 2);
    }
  }
}

/// The chunk's outputs of a value head, and the state after it.
template <class Operand>
void advance(const ChunkScanParams& p, const ScanTask& task, const Chunk& chunk, int64_t head,
             float* state, ForwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = task.v_end - task.v_begin;
  const int rows = chunk.rows, stride = state_stride(columns);
  const TokenValues& t = w.tokens;
  const auto* const s = state_operand<Operand>(state, k_dim, columns, stride, w.state_packed);
  // The next head's values lie in the pages of this one's, which need not be found anew so soon.
  if (head + 1 < task.head_end) {
    prefetch_rows(channels_from(p.v, task.v_begin), task, chunk, head + 1, columns);
  }
  product<Operand, L::kRow, 1>(L::of(w.k), s, stride, w.w, kRowStride, rows, columns, k_dim);
  product<Operand, L::kRow, 1>(L::of(w.q), s, stride, w.o, kRowStride, rows, columns, k_dim);
  subtract_read(p, task, chunk, head, w);
  product<Fp32Operand, kSquareStride, 1>(w.a, w.w, kRowStride, w.u, kRowStride, rows, columns, rows,
                                         Part::kLowerA);
  float decays[kChunk], writes[kChunk];
  for (int i = 0; i < rows; ++i) {
    decays[i] = t.exp_G[i] * t.q_factor[i];
    writes[i] = t.rest[i] * t.k_factor[i];
  }
  product<Fp32Operand, kSquareStride, 1>(w.p, w.u, kRowStride, w.o, kRowStride, rows, columns, rows,
                                         Part::kLowerA, {decays});
  for (int i = 0; i < chunk.n; ++i) {
    const int64_t token = task.sequence.batch_idx * p.sizes.num_tokens + chunk.begin + i;
    store_row<Operand>(w.o + i * kRowStride, columns, p.out,
                       (token * p.sizes.v_heads + head) * p.sizes.v_dim + task.v_begin);
  }
  const auto* const written = second_operand<Operand>(w.u, rows, columns, writes, w.w);
  product<Operand, kSquareStride, 1>(L::of(w.k_by_channel), written, kRowStride, state, stride,
                                     k_dim, columns, rows, Part::kAll, {&t.exp_G[chunk.n - 1], 0});
}

template <class Operand>
void scan(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w) {
  const Sizes& s = p.sizes;
  const int k_dim = static_cast<int>(s.k_dim), v_dim = static_cast<int>(s.v_dim);
  const int stride = state_stride(task.v_end - task.v_begin);
  const int64_t state_size = s.k_dim * stride;
  const int64_t first_state = task.sequence.seq_idx * s.v_heads, group = s.v_heads / s.k_heads;
  for (int64_t head = task.head_begin; head < task.head_end; ++head) {
    const int64_t at = (first_state + head) * s.k_dim * s.v_dim;
    load_state(p.initial_state ? p.initial_state + at : nullptr, p.state_v_first, k_dim, v_dim,
               task.v_begin, task.v_end, task.states + (head - task.head_begin) * state_size,
               stride);
  }
  for (int64_t begin = 0; begin < task.sequence.length; begin += kChunk) {
    const Chunk chunk = chunk_from(task, task.sequence.begin + begin);
    for (int64_t head = task.head_begin; head < task.head_end; ++head) {
      if (head == task.head_begin || head % group == 0) {
        load_keys<Operand>(p, task, chunk, head, w);
      }
      const int64_t at = (head - task.head_begin) * state_size;
      solve(p, task, chunk, head, w);
      advance<Operand>(p, task, chunk, head, task.states + at, w);
    }
  }
  for (int64_t head = task.head_begin; head < task.head_end; ++head) {
    const int64_t at = (first_state + head) * s.k_dim * s.v_dim;
    store_state(task.states + (head - task.head_begin) * state_size, stride, p.state_v_first, k_dim,
                v_dim, task.v_begin, task.v_end, p.final_state + at);
  }
}

}  // namespace

void chunk_scan_kernel(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w) {
#if defined(KVCORE_ISA_AVX512_BF16)
  // What else the products take (the state, scaled rows of U) is rounded to bf16 for them.
  if (p.q.dtype == Dtype::kBFloat16 && p.v.dtype == Dtype::kBFloat16) {
    begin_products();
    scan<Bf16Operand>(p, task, w);
    return end_products();
  }
#endif
  scan<Fp32Operand>(p, task, w);
}

}  // namespace kvcore::gdn::KVCORE_ISA
