// Recurrent step: single-threaded on heads in the order of memory, compiled per ISA level.
//
// A state is read from memory once and written once: the pass that updates it finds it in the
// second-level cache. With keys first that pass reads the next state too, so that memory does not
// idle meanwhile. The output needs no pass of its own, since with u = beta (v - e^g k^T S) it is
// scale (e^g q^T S + (q . k) u).
#include "gdn/cpu/recurrent_step.h"
#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

// Rows of a state that a pass takes at once: sums over the keys, which lie in the first-level
// cache, are loaded and stored once for so many.
constexpr int kPassRows = 2;
static_assert(kHeadDimMultiple % kPassRows == 0);
// Lines between what a pass reads and what it asks for into the second-level cache. The
// CPU's own prefetching stops at the end of each page, and one that fills the first-level cache
// displaces what the pass works on (AMD EPYC of family 25, model 17, 2026-11-21).
constexpr int kLinesAhead = 128;

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

void store_out(const RecurrentStepParams& p, int64_t batch, int64_t head, int64_t token,
               const float* row) {
  const Sizes& s = p.sizes;
  const int64_t at = (batch * s.num_tokens + token) * s.v_heads + head;
  narrow_row(row, static_cast<int>(s.v_dim), p.out, at * s.v_dim);
}

/// A token of a head: where its state is, and where the state after it goes.
struct Step {
  const float* source;
  float* target;
  Token token;
  alignas(64) float ks[kMaxHeadDim], qs[kMaxHeadDim];  // k^T S and q^T S
};

enum class Pass {
  kRead,           // k^T S and q^T S of `next`
  kUpdate,         // the state of `done`
  kUpdateAndRead,  // both, of two states
  kUpdateToRead,   // both: the state after `done` is the one before `next`
};

/// Sums over the keys are chains in the order of the rows, whatever the pass.
template <Pass kPass>
[[gnu::flatten]] void pass_over_states(const Step* done, Step* next, int k_dim, int v_dim) {
  constexpr bool kReads = kPass != Pass::kUpdate, kUpdates = kPass != Pass::kRead;
  if constexpr (kReads) {
    zero_row(next->ks, v_dim);
    zero_row(next->qs, v_dim);
  }
  F32 decay = splat(0.0f);
  if constexpr (kUpdates) decay = splat(done->token.decay);
  for (int row = 0; row < k_dim; row += kPassRows) {
    const int64_t first = static_cast<int64_t>(row) * v_dim;
    F32 k[kPassRows], q[kPassRows], own_k[kPassRows];
    unroll<kPassRows>([&](int i) {
      if constexpr (kReads) {
        k[i] = splat(next->token.k[row + i]);
        q[i] = splat(next->token.q[row + i]);
      }
      if constexpr (kUpdates) own_k[i] = splat(done->token.k[row + i]);
    });
    if constexpr (kReads && kPass != Pass::kUpdateToRead) {
      const char* const ahead = reinterpret_cast<const char*>(next->source + first);
      const int lines = kPassRows * v_dim * static_cast<int>(sizeof(float)) / kLineBytes;
      for (int i = 0; i < lines; ++i) {
        __builtin_prefetch(ahead + (i + kLinesAhead) * kLineBytes, 0, 2);
      }
    }
    for (int c = 0; c < v_dim; c += kLanes) {
      F32 ks = splat(0.0f), qs = ks, u = ks;
      if constexpr (kReads) {
        ks = load(next->ks + c);
        qs = load(next->qs + c);
      }
      if constexpr (kUpdates) u = load(done->token.u + c);
      unroll<kPassRows>([&](int i) {
        const int64_t at = first + i * v_dim + c;
        F32 s = ks;
        if constexpr (kPass == Pass::kRead || kPass == Pass::kUpdateAndRead) {
          s = load(next->source + at);
        }
        if constexpr (kUpdates) {
          const F32 updated = fma(decay, load(done->source + at), own_k[i] * u);
          store(done->target + at, updated);
          if constexpr (kPass == Pass::kUpdateToRead) s = updated;
        }
        if constexpr (kReads) {
          ks = fma(k[i], s, ks);
          qs = fma(q[i], s, qs);
        }
      });
      if constexpr (kReads) {
        store(next->ks + c, ks);
        store(next->qs + c, qs);
      }
    }
  }
}

/// u and the output (over v), from k^T S and q^T S.
void solve(Step& step, int v_dim) {
  Token& t = step.token;
  const F32 decay = splat(t.decay), beta = splat(t.beta), qk = splat(t.qk), scale = splat(t.scale);
  for (int c = 0; c < v_dim; c += kLanes) {
    const F32 u = beta * (load(t.v + c) - decay * load(step.ks + c));
    store(t.u + c, u);
    store(t.v + c, scale * fma(decay, load(step.qs + c), qk * u));
  }
}

/// A step on a [v_dim, k_dim] state, row by row.
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

/// Calls f(batch, head, token, source, target) for the steps of heads [begin, end) of all sequences
/// in turn, tokens innermost. Sequences without a state get zeros. scratch: a state to forget.
template <class F>
void for_each_step(const RecurrentStepParams& p, int64_t begin, int64_t end, float* scratch,
                   const F& f) {
  const Sizes& s = p.sizes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / s.v_heads, head = i % s.v_heads;
    const int32_t* const slots =
        p.state_indices ? p.state_indices + batch * p.num_columns : nullptr;
    const auto state_at = [&](int64_t slot) {
      return p.state + (slot * s.v_heads + head) * s.k_dim * s.v_dim;
    };
    const int64_t start = p.num_accepted ? p.num_accepted[batch] - 1 : 0;
    const int64_t first_slot = slots ? slots[start] : batch;
    const float* source = first_slot < 0 ? nullptr : state_at(first_slot);
    for (int64_t token = 0; token < s.num_tokens; ++token) {
      if (source == nullptr) {
        alignas(64) float zeros[kMaxHeadDim];
        zero_row(zeros, static_cast<int>(s.v_dim));
        store_out(p, batch, head, token, zeros);
        continue;
      }
      const int64_t slot = p.num_columns == 1 ? first_slot : slots[token];
      float* const target = slot < 0 ? scratch : state_at(slot);
      f(batch, head, token, source, target);
      source = target;
    }
  }
}

}  // namespace

void recurrent_step_kernel(const RecurrentStepParams& p, int64_t begin, int64_t end,
                           float* scratch) {
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  Step steps[2];
  if (p.state_v_first) {
    for_each_step(
        p, begin, end, scratch,
        [&](int64_t batch, int64_t head, int64_t token, const float* source, float* target) {
          Token& t = steps[0].token;
          load_token(p, batch, head, token, t);
          step_v_first(source, target, k_dim, v_dim, t);
          store_out(p, batch, head, token, t.v);
        });
    return;
  }
  Step *done = nullptr, *next = &steps[0];
  for_each_step(
      p, begin, end, scratch,
      [&](int64_t batch, int64_t head, int64_t token, const float* source, float* target) {
        next->source = source;
        next->target = target;
        load_token(p, batch, head, token, next->token);
        if (done == nullptr) {
          pass_over_states<Pass::kRead>(nullptr, next, k_dim, v_dim);
        } else if (done->target == source) {
          pass_over_states<Pass::kUpdateToRead>(done, next, k_dim, v_dim);
        } else {
          pass_over_states<Pass::kUpdateAndRead>(done, next, k_dim, v_dim);
        }
        solve(*next, v_dim);
        store_out(p, batch, head, token, next->token.v);
        done = next;
        next = done == &steps[0] ? &steps[1] : &steps[0];
      });
  if (done != nullptr) pass_over_states<Pass::kUpdate>(done, nullptr, k_dim, v_dim);
}

}  // namespace kvcore::gdn::KVCORE_ISA
