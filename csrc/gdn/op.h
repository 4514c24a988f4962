// The Torch-aware half of the family: the ops as the dispatcher calls them and the checks that they
// share. op_*.cpp are compiled unchanged into every library (kvcore_cpu, kvcore_cuda, kvcore_simt),
// each of which links its own definitions of namespace backend in params.h.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "binding/arguments.h"
#include "binding/check.h"
#include "binding/memory.h"
#include "binding/tensor.h"
#include "gdn/params.h"

namespace kvcore::gdn {

using binding::check_tensor;
using binding::element_name;
using binding::HostValues;
using binding::ScalarType;
using binding::Tensor;

// ---- Ops: names, order and meaning of the arguments are those of the schemas in ops.cpp.

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gdn_chunk_scan(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
    std::optional<double> scale, bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
    bool state_v_first, bool save_residuals, bool check_values);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gdn_chunk_scan_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
    const Tensor& beta, const Tensor& g_cumsum, const Tensor& x_inverse, const Tensor& rstd,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& d_final_state,
    const std::optional<Tensor>& cu_seqlens, std::optional<double> scale, bool qk_l2norm,
    bool beta_sigmoid, bool allow_neg_eigval, bool state_v_first);

std::tuple<Tensor, Tensor> gdn_recurrent_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const Tensor& state, const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& state_indices, const std::optional<Tensor>& num_accepted,
    std::optional<double> scale, bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
    bool state_v_first, bool check_values);

Tensor gdn_recurrent_step_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                           const Tensor& beta, const Tensor& state,
                           const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
                           const std::optional<Tensor>& state_indices,
                           const std::optional<Tensor>& num_accepted, std::optional<double> scale,
                           bool qk_l2norm, bool beta_sigmoid, bool allow_neg_eigval,
                           bool state_v_first, bool check_values);

Tensor gdn_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& cu_seqlens, bool silu, bool check_values);

std::tuple<Tensor, Tensor, Tensor> gdn_conv1d_backward(const Tensor& d_out, const Tensor& x,
                                                       const Tensor& weight,
                                                       const std::optional<Tensor>& bias,
                                                       const std::optional<Tensor>& cu_seqlens,
                                                       bool silu);

Tensor gdn_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                         const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& state_indices, bool silu, bool check_values);

std::tuple<Tensor, Tensor> gdn_rms_norm(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& gate, double eps,
                                        double weight_offset);

std::tuple<Tensor, Tensor, Tensor> gdn_rms_norm_backward(const Tensor& d_out, const Tensor& x,
                                                         const Tensor& weight, const Tensor& rstd,
                                                         const std::optional<Tensor>& gate,
                                                         double weight_offset);

// ---- Checks shared by the ops (op_check.cpp). All throw before anything is written.

/// The inputs of the delta rule: q, k, v, g and beta.
Sizes check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& g, const Tensor& beta);

/// What the gates of an op are made of.
struct GateTensors {
  const Tensor& g;
  const Tensor& beta;
  const std::optional<Tensor>& A_log;
  const std::optional<Tensor>& dt_bias;
  bool beta_sigmoid, allow_neg_eigval;
};

/// A_log, dt_bias and the flags; with check_values also that no gate is NaN or above 0.
Gate check_gate(const char* op, const GateTensors& tensors, const Sizes& sizes, bool check_values);

/// int32 [num_seqs + 1] from 0 to num_tokens, never falling; without it a sequence per batch entry.
Sequences check_sequences(const char* op, const std::optional<Tensor>& cu_seqlens,
                          const char* like_name, const Tensor& like, int64_t batch,
                          int64_t num_tokens, bool check_values);

/// fp32 states of num_states sequences, in either layout.
void check_states(const char* op, const char* argument, const Tensor& states, int64_t num_states,
                  const Sizes& sizes, bool state_v_first, const Tensor& like);

/// Slots in [-1, num_slots), none of them twice.
void check_slots(const char* op, const char* argument, const Tensor& indices, int64_t num_slots,
                 bool check_values);

/// Views of [batch, num_tokens, heads, channels] and [batch, num_tokens, heads].
InputView head_view(const char* op, const char* argument, const Tensor& tensor);
InputView gate_view(const char* op, const char* argument, const Tensor& tensor);

}  // namespace kvcore::gdn
