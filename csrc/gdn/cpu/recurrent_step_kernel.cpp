// Recurrent step: single-threaded on one head of one sequence, compiled per ISA level.
//
// A state is read from memory once and written once: the second pass, which updates it, finds it in
// the second-level cache. The output needs no pass of its own, since with u = beta (v - e^g k^T S)
// it is scale (e^g q^T S + (q . k) u).
#include "gdn/cpu/recurrent_step.h"
#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

// Vectors of one row of the state whose sums stay in registers.
constexpr int kSumVectors = kVectorRegisters / 4;

struct Token {
  alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim], u[kMaxHeadDim];
  float decay, beta, scale, qk;
};

void load_token(const RecurrentStepParams& p, int64_t batch, int64_t head, int64_t token,
                Token& t) {
  const int64_t k_head = head / (p.sizes.v_heads / p.sizes.k_heads);
  const int k_dim = static_cast<int>(p.sizes.k_dim);
  widen_row(p.q, batch, k_head, token, k_dim, t.q);
  widen_row(p.k, batch, k_head, token, k_dim, t.k);
  widen_row(p.v, batch, head, token, static_cast<int>(p.sizes.v_dim), t.v);
  t.scale = p.scale;
  if (p.qk_l2norm) {
    scale_row(t.q, norm_factor(t.q, k_dim), k_dim, t.q);
    scale_row(t.k, norm_factor(t.k, k_dim), k_dim, t.k);
  }
  F32 dot = splat(0.0f);
  for (int i = 0; i < k_dim; i += kLanes) dot = fma(load(t.q + i), load(t.k + i), dot);
  t.qk = reduce_add(dot);
  t.decay = expf(log_decay(p.gate, batch, head, token));
  t.beta = write_strength(p.gate, batch, head, token);
}

/// u and the output (over v) of kVectors vectors of columns, from k^T S and q^T S.
template <int kVectors>
[[gnu::flatten]] void read_columns(const float* state, int k_dim, int v_dim, int column, Token& t) {
  F32 ks[kVectors], qs[kVectors];
  unroll<kVectors>([&](int i) { ks[i] = qs[i] = splat(0.0f); });
  for (int row = 0; row < k_dim; ++row) {
    const F32 k = splat(t.k[row]), q = splat(t.q[row]);
    const float* const x = state + static_cast<int64_t>(row) * v_dim + column;
    unroll<kVectors>([&](int i) {
      const F32 s = load(x + i * kLanes);
      ks[i] = fma(k, s, ks[i]);
      qs[i] = fma(q, s, qs[i]);
    });
  }
  const F32 decay = splat(t.decay), beta = splat(t.beta), qk = splat(t.qk), scale = splat(t.scale);
  unroll<kVectors>([&](int i) {
    const int at = column + i * kLanes;
    const F32 u = beta * (load(t.v + at) - decay * ks[i]);
    store(t.u + at, u);
    store(t.v + at, scale * fma(decay, qs[i], qk * u));
  });
}

void step(const float* source, float* target, int k_dim, int v_dim, Token& t) {
  int column = 0;
  for (; column + kSumVectors * kLanes <= v_dim; column += kSumVectors * kLanes) {
    read_columns<kSumVectors>(source, k_dim, v_dim, column, t);
  }
  for (; column < v_dim; column += kLanes) read_columns<1>(source, k_dim, v_dim, column, t);
  const F32 decay = splat(t.decay);
  for (int row = 0; row < k_dim; ++row) {
    const F32 k = splat(t.k[row]);
    const int64_t at = static_cast<int64_t>(row) * v_dim;
    for (int c = 0; c < v_dim; c += kLanes) {
      store(target + at + c, fma(decay, load(source + at + c), k * load(t.u + c)));
    }
  }
}

/// The same on a [v_dim, k_dim] state, row by row.
void step_v_first(const float* source, float* target, int k_dim, int v_dim, Token& t) {
  const F32 decay = splat(t.decay);
  for (int row = 0; row < v_dim; ++row) {
    const float* const x = source + static_cast<int64_t>(row) * k_dim;
    float* const y = target + static_cast<int64_t>(row) * k_dim;
    F32 ks = splat(0.0f), qs = splat(0.0f);
    for (int c = 0; c < k_dim; c += kLanes) {
      ks = fma(load(t.k + c), load(x + c), ks);
      qs = fma(load(t.q + c), load(x + c), qs);
    }
    const float u = t.beta * (t.v[row] - t.decay * reduce_add(ks));
    t.v[row] = t.scale * (t.decay * reduce_add(qs) + t.qk * u);
    for (int c = 0; c < k_dim; c += kLanes) {
      store(y + c, fma(decay, load(x + c), load(t.k + c) * splat(u)));
    }
  }
}

}  // namespace

void recurrent_step_kernel(const RecurrentStepParams& p, int64_t batch, int64_t head,
                           float* scratch) {
  const Sizes& s = p.sizes;
  const int k_dim = static_cast<int>(s.k_dim), v_dim = static_cast<int>(s.v_dim);
  const int32_t* const slots = p.state_indices ? p.state_indices + batch * p.num_columns : nullptr;
  const auto state_at = [&](int64_t slot) {
    return p.state + (slot * s.v_heads + head) * s.k_dim * s.v_dim;
  };
  const int64_t start = p.num_accepted ? p.num_accepted[batch] - 1 : 0;
  const int64_t first_slot = slots ? slots[start] : batch;
  Token t;
  const float* source = first_slot < 0 ? nullptr : state_at(first_slot);
  for (int64_t token = 0; token < s.num_tokens; ++token) {
    const int64_t row = (batch * s.num_tokens + token) * s.v_heads + head;
    if (source == nullptr) {
      zero_row(t.v, v_dim);
    } else {
      load_token(p, batch, head, token, t);
      const int64_t slot = p.num_columns == 1 ? first_slot : slots[token];
      float* const target = slot < 0 ? scratch : state_at(slot);
      (p.state_v_first ? step_v_first : step)(source, target, k_dim, v_dim, t);
      source = target;
    }
    narrow_row(t.v, v_dim, p.out, row * s.v_dim);
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
