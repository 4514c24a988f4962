// gdn_chunk_scan and its backward: checks, outputs, and the call of the backend.
#include "gdn/op.h"

namespace kvcore::gdn {
namespace {

using binding::data;
using binding::mutable_data;
using binding::new_output;
using binding::output_view;

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gdn_chunk_scan(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
    std::optional<double> scale, bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
    bool state_v_first, bool save_residuals, bool check_values) {
  constexpr const char* kOp = "gdn_chunk_scan";
  const Sizes sizes = check_inputs(kOp, q, k, v, g, beta);
  const Gate gate = check_gate(kOp, {g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval},
                               sizes, check_values);
  const float checked_scale = binding::check_scale(kOp, scale, sizes.k_dim);
  const Sequences sequences =
      check_sequences(kOp, cu_seqlens, "q", q, sizes.batch, sizes.num_tokens, check_values);
  if (initial_state) {
    check_states(kOp, "initial_state", *initial_state, sequences.num_seqs, sizes, state_v_first, q);
  }

  const auto& [batch, num_tokens, k_heads, v_heads, k_dim, v_dim] = sizes;
  const auto fp32 = [&](const char* name, std::initializer_list<int64_t> shape, bool wanted) {
    return wanted ? new_output(kOp, name, q, shape, ScalarType::Float)
                  : new_output(kOp, name, q, {0}, ScalarType::Float);
  };
  Tensor out = new_output(kOp, "out", q, {batch, num_tokens, v_heads, v_dim}, q.scalar_type());
  Tensor final_state = fp32(
      "final_state",
      {sequences.num_seqs, v_heads, state_v_first ? v_dim : k_dim, state_v_first ? k_dim : v_dim},
      true);
  Tensor g_cumsum = fp32("g_cumsum", {batch, num_tokens, v_heads}, save_residuals);
  Tensor x_inverse = fp32("x_inverse", {batch, num_tokens, v_heads, kChunk}, save_residuals);
  Tensor rstd = fp32("rstd", {2, batch, num_tokens, k_heads}, save_residuals && qk_l2norm);
  backend::chunk_scan({.q = head_view(kOp, "q", q),
                       .k = head_view(kOp, "k", k),
                       .v = head_view(kOp, "v", v),
                       .gate = gate,
                       .sizes = sizes,
                       .sequences = sequences,
                       .scale = checked_scale,
                       .qk_l2norm = qk_l2norm,
                       .state_v_first = state_v_first,
                       .save_residuals = save_residuals,
                       .initial_state = data<float>(initial_state),
                       .out = output_view(kOp, "out", out),
                       .final_state = mutable_data<float>(final_state),
                       .g_cumsum = mutable_data<float>(g_cumsum),
                       .x_inverse = mutable_data<float>(x_inverse),
                       .rstd = mutable_data<float>(rstd)});
  return {out, final_state, g_cumsum, x_inverse, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gdn_chunk_scan_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
    const Tensor& beta, const Tensor& g_cumsum, const Tensor& x_inverse, const Tensor& rstd,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& d_final_state,
    const std::optional<Tensor>& cu_seqlens, std::optional<double> scale, bool qk_l2norm,
    bool beta_sigmoid, bool allow_neg_eigval, bool state_v_first) {
  constexpr const char* kOp = "gdn_chunk_scan_backward";
  const Sizes sizes = check_inputs(kOp, q, k, v, g, beta);
  const auto& [batch, num_tokens, k_heads, v_heads, k_dim, v_dim] = sizes;
  KV_CHECK_SHAPE(kOp, d_out, batch, num_tokens, v_heads, v_dim);
  KV_CHECK_SAME_DTYPE(kOp, d_out, q);
  KV_CHECK_SAME_DEVICE(kOp, d_out, q);
  const Gate gate =
      check_gate(kOp, {g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval}, sizes, false);
  const float checked_scale = binding::check_scale(kOp, scale, k_dim);
  const Sequences sequences = check_sequences(kOp, cu_seqlens, "q", q, batch, num_tokens, false);
  for (const auto& [name, states] :
       {std::pair{"initial_state", &initial_state}, std::pair{"d_final_state", &d_final_state}}) {
    if (*states) check_states(kOp, name, **states, sequences.num_seqs, sizes, state_v_first, q);
  }
  check_tensor(kOp, "g_cumsum", g_cumsum, ScalarType::Float, {batch, num_tokens, v_heads}, q);
  check_tensor(kOp, "x_inverse", x_inverse, ScalarType::Float, {batch, num_tokens, v_heads, kChunk},
               q);
  if (qk_l2norm) {
    check_tensor(kOp, "rstd", rstd, ScalarType::Float, {2, batch, num_tokens, k_heads}, q);
  }

  Tensor dq = new_output(kOp, "dq", q, {batch, num_tokens, k_heads, k_dim}, q.scalar_type());
  Tensor dk = new_output(kOp, "dk", q, {batch, num_tokens, k_heads, k_dim}, q.scalar_type());
  Tensor dv = new_output(kOp, "dv", q, {batch, num_tokens, v_heads, v_dim}, q.scalar_type());
  Tensor dg = new_output(kOp, "dg", q, {batch, num_tokens, v_heads}, g.scalar_type());
  Tensor dbeta = new_output(kOp, "dbeta", q, {batch, num_tokens, v_heads}, beta.scalar_type());
  // Gradients of absent arguments are empty.
  const int64_t rows = state_v_first ? v_dim : k_dim, columns = state_v_first ? k_dim : v_dim;
  Tensor dA_log = new_output(kOp, "dA_log", q, {A_log ? v_heads : 0}, ScalarType::Float);
  Tensor ddt_bias = new_output(kOp, "ddt_bias", q, {dt_bias ? v_heads : 0}, ScalarType::Float);
  Tensor d_initial_state =
      initial_state ? new_output(kOp, "d_initial_state", q,
                                 {sequences.num_seqs, v_heads, rows, columns}, ScalarType::Float)
                    : new_output(kOp, "d_initial_state", q, {0}, ScalarType::Float);
  backend::chunk_scan_backward(
      {.d_out = head_view(kOp, "d_out", d_out),
       .q = head_view(kOp, "q", q),
       .k = head_view(kOp, "k", k),
       .v = head_view(kOp, "v", v),
       .gate = gate,
       .g_cumsum = data<float>(g_cumsum),
       .x_inverse = data<float>(x_inverse),
       .rstd = data<float>(rstd),
       .sizes = sizes,
       .sequences = sequences,
       .scale = checked_scale,
       .qk_l2norm = qk_l2norm,
       .state_v_first = state_v_first,
       .initial_state = data<float>(initial_state),
       .d_final_state = data<float>(d_final_state),
       .dq = output_view(kOp, "dq", dq),
       .dk = output_view(kOp, "dk", dk),
       .dv = output_view(kOp, "dv", dv),
       .dg = output_view(kOp, "dg", dg),
       .dbeta = output_view(kOp, "dbeta", dbeta),
       .dA_log = A_log ? mutable_data<float>(dA_log) : nullptr,
       .ddt_bias = dt_bias ? mutable_data<float>(ddt_bias) : nullptr,
       .d_initial_state = initial_state ? mutable_data<float>(d_initial_state) : nullptr});
  return {dq, dk, dv, dg, dbeta, dA_log, ddt_bias, d_initial_state};
}

}  // namespace kvcore::gdn
