// One plain struct per op: what a backend gets after op.cpp has checked everything; at the end, the
// functions that get them.
//
// Dimensions: batch, q_heads, kv_heads (divides q_heads), q_len, kv_len, head_dim. A pointer is
// followed by its shape; every array is contiguous unless it is a view; "may be null" is said.
#pragma once

#include <cstdint>

#include "core/view.h"
#include "dense/layout.h"

namespace kvcore::dense {

struct Sizes {
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
};

struct AttentionParams {
  InputView q;     // [batch, q_heads, q_len, head_dim]
  InputView k, v;  // [batch, kv_heads, kv_len, head_dim]
  Sizes sizes;
  bool causal;  // query i sees keys up to i + kv_len - q_len
  float scale;
  OutputView out;  // [batch, q_len, q_heads, head_dim]
  float* lse;      // [batch, q_heads, q_len]
};

struct AttentionBackwardParams {
  InputView d_out, q, out;  // [batch, q_heads, q_len, head_dim]
  InputView k, v;           // [batch, kv_heads, kv_len, head_dim]
  const float* lse;         // [batch, q_heads, q_len]
  const float* d_lse;       // [batch, q_heads, q_len], may be null (zeros)
  Sizes sizes;
  bool causal;
  float scale;
  OutputView dq;      // [batch, q_len, q_heads, head_dim]
  OutputView dk, dv;  // [batch, kv_len, kv_heads, head_dim]
};

/// What each library that has the family defines for itself.
namespace backend {

void attention(const AttentionParams& params);
void attention_backward(const AttentionBackwardParams& params);

}  // namespace backend
}  // namespace kvcore::dense
