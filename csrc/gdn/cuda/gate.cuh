// Decay and write strength of a token, from whatever the op was given.
#pragma once

#include "core/cuda/rows.cuh"
#include "gdn/params.h"

namespace kvcore::gdn {

struct DeviceGate {
  DeviceRows g, beta;
  const float* A_log;    // may be null
  const float* dt_bias;  // may be null
  bool beta_sigmoid;
  float beta_scale;
};

inline DeviceGate device_gate(const Gate& gate) {
  return {.g = device_rows(gate.g),
          .beta = device_rows(gate.beta),
          .A_log = gate.A_log,
          .dt_bias = gate.dt_bias,
          .beta_sigmoid = gate.beta_sigmoid,
          .beta_scale = gate.beta_scale};
}

/// ln(1 + e^x), and x beyond the threshold.
__device__ inline float softplus(float x) { return x > kSoftplusThreshold ? x : log1pf(expf(x)); }
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// One gate's value as given.
__device__ inline float gate_at(const DeviceRows& rows, int64_t batch_idx, int64_t head,
                                int64_t token) {
  return load_channel(rows, rows.head(batch_idx, head) + token * rows.token_stride, 0);
}

/// What enters the softplus; only with A_log.
__device__ inline float softplus_input(const DeviceGate& gate, int64_t batch_idx, int64_t head,
                                       int64_t token) {
  const float bias = gate.dt_bias != nullptr ? gate.dt_bias[head] : 0.0f;
  return gate_at(gate.g, batch_idx, head, token) + bias;
}

__device__ inline float log_decay(const DeviceGate& gate, int64_t batch_idx, int64_t head,
                                  int64_t token) {
  if (gate.A_log == nullptr) return gate_at(gate.g, batch_idx, head, token);
  return -expf(gate.A_log[head]) * softplus(softplus_input(gate, batch_idx, head, token));
}

/// e^(G_i - G_j), the decay between tokens i and j of a chunk; where j is not past, its exponent
/// may be positive, and 1 is returned.
__device__ inline float past_decay(bool past, float G_i, float G_j) {
  return expf(past ? G_i - G_j : 0.0f);
}

__device__ inline float write_strength(const DeviceGate& gate, int64_t batch_idx, int64_t head,
                                       int64_t token) {
  const float beta = gate_at(gate.beta, batch_idx, head, token);
  return gate.beta_sigmoid ? gate.beta_scale * sigmoid(beta) : beta;
}

}  // namespace kvcore::gdn
