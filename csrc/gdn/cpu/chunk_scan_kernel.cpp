// Chunked gated delta rule, forward: single-threaded, compiled per ISA level. The equations are
// those of csrc/gdn/README.md.
#include "gdn/cpu/solve.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// How q, k and the state enter products with each other.
template <class Operand>
struct Layout {
  using Element = typename Operand::Element;
  static constexpr int kStride = kRowStride / Operand::kPack;  // of a row of q or k
  static Element* rows(float* memory) { return reinterpret_cast<Element*>(memory); }
};

/// The chunk's tokens: operands of q and k, gates, and what the backward needs of them.
template <class Operand>
void load_tokens(const ChunkScanParams& p, const ScanTask& task, int64_t begin, int n, int rows,
                 ForwardWorkspace& w) {
  using L = Layout<Operand>;
  const int64_t batch = task.sequence.batch_idx, first = task.sequence.begin + begin;
  const int64_t k_head = task.head / (p.sizes.v_heads / p.sizes.k_heads);
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  float G = 0.0f;
  alignas(64) float pair[2][kMaxHeadDim];
  for (int i = 0; i < rows; ++i) {
    float* const row = pair[i % 2];
    float factors[2] = {p.scale, 1.0f};
    for (int which = 0; which < 2; ++which) {
      if (i < n) {
        widen_row(which == 0 ? p.q : p.k, batch, k_head, first + i, k_dim, row);
      } else {
        zero_row(row, k_dim);
      }
      if (p.qk_l2norm && i < n) {
        const float rstd = norm_factor(row, k_dim);
        factors[which] *= rstd;
        if (p.save_residuals && task.first_part) {
          const int64_t token = (which * p.sizes.batch + batch) * p.sizes.num_tokens + first + i;
          p.rstd[token * p.sizes.k_heads + k_head] = rstd;
        }
      }
      float* const target = which == 0 ? w.q : w.k;
      if constexpr (Operand::kPack == 1) {
        memcpy(target + i * kRowStride, row, k_dim * sizeof(float));
      } else {
        narrow_row(row, k_dim, reinterpret_cast<BFloat16*>(L::rows(target) + i * L::kStride));
      }
    }
    if constexpr (Operand::kPack == 2) {
      if (i % 2 == 1) {
        pack_pairs(pair[0], pair[1], k_dim, L::rows(w.k_packed) + i / 2 * kRowStride);
      }
    }
    if (i >= n) continue;
    G += log_decay(p.gate, batch, task.head, first + i);
    w.tokens.G[i] = G;
    w.tokens.beta[i] = write_strength(p.gate, batch, task.head, first + i);
    w.tokens.q_factor[i] = factors[0];
    w.tokens.k_factor[i] = factors[1];
    if (p.save_residuals && task.first_part) {
      p.g_cumsum[(batch * p.sizes.num_tokens + first + i) * p.sizes.v_heads + task.head] = G;
    }
  }
  fill_decays(w.tokens, n, rows);
}

/// X, A and P of the chunk.
template <class Operand>
void solve(const ChunkScanParams& p, const ScanTask& task, int64_t begin, int n, int rows,
           ForwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  // Rounded up to whole blocks: what lies beyond k_dim is not read again.
  const int packed_dim = (k_dim / Operand::kPack + 15) / 16 * 16;
  auto* const k = L::rows(w.k);
  auto* const k_transposed = L::rows(w.k_transposed);
  transpose(k, L::kStride, rows, packed_dim, k_transposed, kSquareStride);
  product<Operand, L::kStride, 1>(k, k_transposed, kSquareStride, w.kk, kSquareStride, rows, rows,
                                  k_dim, Part::kLowerC);
  product<Operand, L::kStride, 1>(L::rows(w.q), k_transposed, kSquareStride, w.qk, kSquareStride,
                                  rows, rows, k_dim, Part::kLowerC);
  invert(w.tokens, rows, w.kk, w.x);
  weigh(w.tokens, rows, w.x, w.qk, w.a);
  if (p.save_residuals && task.first_part) {
    for (int i = 0; i < n; ++i) {
      const int64_t token =
          task.sequence.batch_idx * p.sizes.num_tokens + task.sequence.begin + begin + i;
      float* const target = p.x_inverse + (token * p.sizes.v_heads + task.head) * kChunk;
      const int end = filled_columns(i);
      memcpy(target, w.x + i * kSquareStride, end * sizeof(float));
      zero_row(target + end, kChunk - end);
    }
  }
}

template <class Operand>
void pack_state(const float* state, int k_dim, int columns, float* packed) {
  if constexpr (Operand::kPack == 2) {
    for (int i = 0; i < k_dim; i += 2) {
      pack_pairs(state + i * columns, state + (i + 1) * columns, columns,
                 Layout<Operand>::rows(packed) + i / 2 * columns);
    }
  }
}

/// The chunk's outputs, and the state after it.
template <class Operand>
void advance(const ChunkScanParams& p, const ScanTask& task, int64_t begin, int n, int rows,
             ForwardWorkspace& w) {
  using L = Layout<Operand>;
  const int k_dim = static_cast<int>(p.sizes.k_dim), columns = task.v_end - task.v_begin;
  const int64_t first = task.sequence.begin + begin;
  const TokenValues& t = w.tokens;
  const auto* const state = L::rows(Operand::kPack == 1 ? w.state : w.state_packed);
  product<Operand, L::kStride, 1>(L::rows(w.k), state, columns, w.w, kRowStride, rows, columns,
                                  k_dim);
  product<Operand, L::kStride, 1>(L::rows(w.q), state, columns, w.o, kRowStride, rows, columns,
                                  k_dim);
  const InputView v = channels_from(p.v, task.v_begin);
  for (int i = 0; i < rows; ++i) {
    float* const row = w.v + i * kRowStride;
    if (i < n) {
      widen_row(v, task.sequence.batch_idx, task.head, first + i, columns, row);
    } else {
      zero_row(row, columns);
    }
    const F32 read = splat(-t.exp_G[i] * t.k_factor[i]);
    float* const target = w.w + i * kRowStride;
    for (int c = 0; c < columns; c += kLanes) {
      store(target + c, fma(read, load(target + c), load(row + c)));
    }
    scale_row(w.o + i * kRowStride, t.exp_G[i] * t.q_factor[i], columns, w.o + i * kRowStride);
  }
  product<Fp32Operand, kSquareStride, 1>(w.a, w.w, kRowStride, w.u, kRowStride, rows, columns, rows,
                                         Part::kLowerA);
  product<Fp32Operand, kSquareStride, 1>(w.qk, w.u, kRowStride, w.o, kRowStride, rows, columns,
                                         rows, Part::kLowerA, true);
  for (int i = 0; i < n; ++i) {
    const int64_t token = task.sequence.batch_idx * p.sizes.num_tokens + first + i;
    narrow_row(w.o + i * kRowStride, columns, p.out,
               (token * p.sizes.v_heads + task.head) * p.sizes.v_dim + task.v_begin);
  }
  for (int i = 0; i < rows; ++i) {
    scale_row(w.u + i * kRowStride, t.rest[i] * t.k_factor[i], columns, w.u + i * kRowStride);
    if constexpr (Operand::kPack == 2) {
      if (i % 2 == 1) {
        pack_pairs(w.u + (i - 1) * kRowStride, w.u + i * kRowStride, columns,
                   L::rows(w.w) + i / 2 * kRowStride);
      }
    }
  }
  const auto* const k = L::rows(Operand::kPack == 1 ? w.k : w.k_packed);
  const auto* const u = L::rows(Operand::kPack == 1 ? w.u : w.w);
  product<Operand, 1, kRowStride>(k, u, kRowStride, w.state, columns, k_dim, columns, rows,
                                  Part::kAll, true, t.exp_G[n - 1]);
}

template <class Operand>
void scan(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w) {
  const Sizes& s = p.sizes;
  const int k_dim = static_cast<int>(s.k_dim), v_dim = static_cast<int>(s.v_dim);
  const int64_t state = (task.sequence.seq_idx * s.v_heads + task.head) * s.k_dim * s.v_dim;
  load_state(p.initial_state ? p.initial_state + state : nullptr, p.state_v_first, k_dim, v_dim,
             task.v_begin, task.v_end, w.state);
  for (int64_t begin = 0; begin < task.sequence.length; begin += kChunk) {
    const int64_t left = task.sequence.length - begin;
    const int n = static_cast<int>(left < kChunk ? left : kChunk);
    const int rows = (n + kProductMultiple - 1) / kProductMultiple * kProductMultiple;
    load_tokens<Operand>(p, task, begin, n, rows, w);
    solve<Operand>(p, task, begin, n, rows, w);
    pack_state<Operand>(w.state, k_dim, task.v_end - task.v_begin, w.state_packed);
    advance<Operand>(p, task, begin, n, rows, w);
  }
  store_state(w.state, p.state_v_first, k_dim, v_dim, task.v_begin, task.v_end,
              p.final_state + state);
}

}  // namespace

void chunk_scan_kernel(const ChunkScanParams& p, const ScanTask& task, ForwardWorkspace& w) {
#if defined(KVCORE_ISA_AVX512_BF16)
  // What else the products take (the state, scaled rows of U) is rounded to bf16 for them.
  if (p.q.dtype == Dtype::kBFloat16 && p.v.dtype == Dtype::kBFloat16) {
    return scan<Bf16Operand>(p, task, w);
  }
#endif
  scan<Fp32Operand>(p, task, w);
}

}  // namespace kvcore::gdn::KVCORE_ISA
