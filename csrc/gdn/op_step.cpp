// gdn_recurrent_step and its in-place twin.
#include "gdn/op.h"

namespace kvcore::gdn {
namespace {

/// Everything but the state and the output, which may be a copy and is new.
RecurrentStepParams check_step(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               const GateTensors& gate, const Tensor& state,
                               const std::optional<Tensor>& state_indices,
                               const std::optional<Tensor>& num_accepted,
                               std::optional<double> scale, bool qk_l2norm, bool state_v_first,
                               bool check_values) {
  const Sizes sizes = check_inputs(op, q, k, v, gate.g, gate.beta);
  const Gate checked_gate = check_gate(op, gate, sizes, check_values);
  const float checked_scale = binding::check_scale(op, scale, sizes.k_dim);
  KV_CHECK_DIM(op, state, 4);
  const int64_t num_slots = state.size(0);
  check_states(op, "state", state, num_slots, sizes, state_v_first, q);
  int64_t num_columns = 1;
  if (state_indices) {
    const Tensor& indices = *state_indices;
    if (indices.dim() == 2) num_columns = indices.size(1);
    KV_CHECK(indices.dim() == 1 || (indices.dim() == 2 && num_columns >= 1), op, "state_indices",
             "[batch] or [batch, columns]", binding::format_shape(indices));
    if (indices.dim() == 1) {
      check_tensor(op, "state_indices", indices, ScalarType::Int, {sizes.batch}, q);
    } else {
      check_tensor(op, "state_indices", indices, ScalarType::Int, {sizes.batch, num_columns}, q);
    }
    KV_CHECK(num_columns == 1 || num_columns >= sizes.num_tokens, op, "state_indices",
             "of 1 column or at least " + std::to_string(sizes.num_tokens), num_columns);
    check_slots(op, "state_indices", indices, num_slots, check_values);
  } else {
    KV_CHECK(num_slots == sizes.batch, op, "state",
             "of " + std::to_string(sizes.batch) + " slots without state_indices", num_slots);
  }
  if (num_accepted) {
    KV_CHECK(state_indices.has_value(), op, "num_accepted", "None without state_indices",
             binding::format_shape(*num_accepted));
    check_tensor(op, "num_accepted", *num_accepted, ScalarType::Int, {sizes.batch}, q);
    const HostValues<> values(*num_accepted, check_values);
    for (int64_t i = 0; values.readable() && i < sizes.batch; ++i) {
      KV_CHECK(values[i] >= 1 && values[i] <= num_columns, op, element_name("num_accepted", {i}),
               "in [1, " + std::to_string(num_columns) + "]", values[i]);
    }
  }
  return {.q = head_view(op, "q", q),
          .k = head_view(op, "k", k),
          .v = head_view(op, "v", v),
          .gate = checked_gate,
          .sizes = sizes,
          .scale = checked_scale,
          .qk_l2norm = qk_l2norm,
          .state_v_first = state_v_first,
          .state = nullptr,
          .num_slots = num_slots,
          .state_indices = binding::data<int32_t>(state_indices),
          .num_columns = num_columns,
          .num_accepted = binding::data<int32_t>(num_accepted),
          .out = {}};
}

Tensor run_step(const char* op, RecurrentStepParams params, const Tensor& q, const Tensor& state) {
  const Sizes& s = params.sizes;
  Tensor out = binding::new_output(op, "out", q, {s.batch, s.num_tokens, s.v_heads, s.v_dim},
                                   q.scalar_type());
  params.state = binding::mutable_data<float>(state);
  params.out = binding::output_view(op, "out", out);
  backend::recurrent_step(params);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> gdn_recurrent_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const Tensor& state, const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& state_indices, const std::optional<Tensor>& num_accepted,
    std::optional<double> scale, bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
    bool state_v_first, bool check_values) {
  constexpr const char* kOp = "gdn_recurrent_step";
  const RecurrentStepParams params =
      check_step(kOp, q, k, v, {g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval}, state,
                 state_indices, num_accepted, scale, qk_l2norm, state_v_first, check_values);
  Tensor new_state = torch::stable::clone(state);
  Tensor out = run_step(kOp, params, q, new_state);
  return {out, new_state};
}

Tensor gdn_recurrent_step_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                           const Tensor& beta, const Tensor& state,
                           const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
                           const std::optional<Tensor>& state_indices,
                           const std::optional<Tensor>& num_accepted, std::optional<double> scale,
                           bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
                           bool state_v_first, bool check_values) {
  constexpr const char* kOp = "gdn_recurrent_step_";
  const RecurrentStepParams params =
      check_step(kOp, q, k, v, {g, beta, A_log, dt_bias, beta_sigmoid, allow_neg_eigval}, state,
                 state_indices, num_accepted, scale, qk_l2norm, state_v_first, check_values);
  binding::check_disjoint(kOp, {{"state", state}},
                          {{"q", q},
                           {"k", k},
                           {"v", v},
                           {"g", g},
                           {"beta", beta},
                           {"A_log", A_log},
                           {"dt_bias", dt_bias},
                           {"state_indices", state_indices},
                           {"num_accepted", num_accepted}});
  return run_step(kOp, params, q, state);
}

}  // namespace kvcore::gdn
