// Gates, norms and states as the CPU kernels read them. For code that is compiled per ISA level.
#pragma once

#include <math.h>

#include "core/cpu/gemm.h"
#include "core/cpu/rows.h"
#include "gdn/cpu/chunk.h"

namespace kvcore::gdn::KVCORE_ISA {

using namespace kvcore::KVCORE_ISA;

constexpr int kLineBytes = 64;  // of a cache

/// e^x, also of positive x: infinity beyond 88.
inline F32 exp_any(F32 x) {
  const F32 limit = splat(88.0f);
  const F32 clipped = select(less(limit, x), limit, x);
  return select(less(limit, x), splat(INFINITY), exp_nonpositive(clipped));
}

/// The view from a channel on.
inline InputView channels_from(InputView view, int64_t channel) {
  const int64_t element_bytes = view.dtype == Dtype::kFloat32 ? 4 : 2;
  view.data = static_cast<const char*>(view.data) + channel * view.channel_stride * element_bytes;
  return view;
}

inline float scalar_at(const InputView& view, int64_t batch, int64_t head, int64_t token) {
  float value;
  widen_row(view, batch, head, token, 1, &value);
  return value;
}

/// ln(1 + e^x), and x beyond the threshold.
inline float softplus(float x) { return x > kSoftplusThreshold ? x : log1pf(expf(x)); }
inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

inline float log_decay(const Gate& gate, int64_t batch, int64_t head, int64_t token) {
  const float g = scalar_at(gate.g, batch, head, token);
  if (gate.A_log == nullptr) return g;
  const float bias = gate.dt_bias ? gate.dt_bias[head] : 0.0f;
  return -expf(gate.A_log[head]) * softplus(g + bias);
}

inline float write_strength(const Gate& gate, int64_t batch, int64_t head, int64_t token) {
  const float beta = scalar_at(gate.beta, batch, head, token);
  return gate.beta_sigmoid ? gate.beta_scale * sigmoid(beta) : beta;
}

template <class T>
inline float norm_factor(const T* x, int n) {
  F32 sum = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const F32 values = load(x + i);
    sum = fma(values, values, sum);
  }
  return 1.0f / sqrtf(reduce_add(sum) + kNormEpsilon);
}

/// y = x * factor, of n values.
inline void scale_row(const float* x, float factor, int n, float* y) {
  const F32 f = splat(factor);
  for (int i = 0; i < n; i += kLanes) store(y + i, load(x + i) * f);
}

inline void zero_row(float* x, int n) {
  for (int i = 0; i < n; i += kLanes) store(x + i, splat(0.0f));
}

/// Decays of a chunk of n tokens from their sums G; the rest is padding up to `rows`.
inline void fill_decays(TokenValues& t, int n, int rows) {
  for (int i = n; i < rows; ++i) {
    t.G[i] = t.G[n - 1];
    t.beta[i] = t.q_factor[i] = t.k_factor[i] = 0.0f;
  }
  const F32 last = splat(t.G[n - 1]);
  for (int i = 0; i < rows; i += kLanes) {
    store(t.exp_G + i, exp_any(load(t.G + i)));
    store(t.rest + i, exp_any(last - load(t.G + i)));
  }
}

/// Columns [v_begin, v_end) of a state in memory, [k_dim, v_dim] or v first, to or from a [k_dim,
/// columns] array whose rows lie `stride` apart. A null source means zeros.
inline void load_state(const float* source, bool v_first, int k_dim, int v_dim, int v_begin,
                       int v_end, float* state, int stride) {
  const int columns = v_end - v_begin;
  if (source == nullptr) {
    for (int i = 0; i < k_dim; ++i) zero_row(state + i * stride, columns);
  } else if (v_first) {
    transpose(source + static_cast<int64_t>(v_begin) * k_dim, k_dim, columns, k_dim, state, stride);
  } else {
    for (int i = 0; i < k_dim; ++i) {
      memcpy(state + i * stride, source + i * v_dim + v_begin, columns * sizeof(float));
    }
  }
}

inline void store_state(const float* state, int stride, bool v_first, int k_dim, int v_dim,
                        int v_begin, int v_end, float* target) {
  const int columns = v_end - v_begin;
  if (v_first) {
    transpose(state, stride, k_dim, columns, target + static_cast<int64_t>(v_begin) * k_dim, k_dim);
  } else {
    for (int i = 0; i < k_dim; ++i) {
      memcpy(target + i * v_dim + v_begin, state + i * stride, columns * sizeof(float));
    }
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
