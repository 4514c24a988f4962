// Every op's schema, and nothing else. Defaults live here; the Python wrappers repeat them and a
// test compares the two.
#include <torch/csrc/stable/library.h>

// KVCORE_LIBRARY is kvcore; in the test library kvcore_simt it is kvcore_simt.
STABLE_TORCH_LIBRARY(KVCORE_LIBRARY, m) {
  // Raises what kernels reported on the device of `like` (csrc/core/error_flags.h).
  m.def("raise_errors(Tensor like) -> ()");

  // ---- turbo: attention on float inputs
  m.def(
      "turbo_attention(Tensor q, Tensor k, Tensor v, Tensor? k_balance=None, Tensor? k_mean=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, *, bool causal=False, "
      "float? scale=None, int? window=None, float? sas_threshold=-15.0, bool check_values=False) "
      "-> (Tensor out, Tensor lse)");

  // ---- turbo: the quantized store
  m.def(
      "turbo_calibrate(Tensor k, Tensor? left_padding=None, *, bool balance=True, "
      "bool subtract_mean=True, int rotary_dim=-1, bool check_values=False) "
      "-> (Tensor k_balance, Tensor k_mean)");
  m.def(
      "turbo_head_priority(Tensor x, Tensor? left_padding=None, *, bool check_values=False) "
      "-> Tensor");
  m.def(
      "turbo_quantize(Tensor k, Tensor v, Tensor? k_balance=None, Tensor? k_mean=None, "
      "Tensor? left_padding=None, *, int[] k_bits=[4], int[] v_bits=[4], int sink_pages=1, "
      "float tail_margin=1.25, bool check_values=False) "
      "-> (Tensor pool8, Tensor pool4, Tensor pool2, Tensor block_table, Tensor tail, "
      "Tensor tail_scale, Tensor clamp_count, Tensor seq_lens)");
  m.def(
      "turbo_append(Tensor k, Tensor v, Tensor(a!)[] pool, Tensor block_table, Tensor(b!) tail, "
      "Tensor(c!) tail_scale, Tensor(d!) clamp_count, Tensor(e!) seq_lens, "
      "Tensor? k_balance=None, Tensor? k_mean=None, Tensor? left_padding=None, *, "
      "float tail_margin=1.25, bool check_values=False) -> ()");
  m.def(
      "turbo_rewind(Tensor[] pool, Tensor block_table, Tensor(a!) tail, Tensor(b!) seq_lens, "
      "Tensor new_lens, *, bool check_values=False) -> ()");
  m.def(
      "turbo_dequantize(Tensor[] pool, Tensor block_table, Tensor tail, Tensor seq_lens, "
      "Tensor? k_balance=None, Tensor? k_mean=None, *, int kv_len, bool right_align=False, "
      "ScalarType dtype=float, bool check_values=False) -> (Tensor k, Tensor v)");
  m.def(
      "turbo_decode(Tensor q, Tensor[] pool, Tensor block_table, Tensor tail, Tensor seq_lens, "
      "Tensor? k_balance=None, Tensor? k_mean=None, *, bool causal=True, float? scale=None, "
      "int? window=None, float? sas_threshold=-15.0, bool check_values=False) "
      "-> (Tensor out, Tensor lse)");

  // ---- lexico: sparse codes
  m.def(
      "lexico_encode(Tensor x, Tensor dictionary, Tensor? gram=None, *, int sparsity, "
      "float tolerance=0.0, ScalarType dtype=int8, bool check_values=False) "
      "-> (Tensor indices, Tensor coefficients, Tensor scale, Tensor residual)");
  m.def(
      "lexico_reconstruct(Tensor indices, Tensor coefficients, Tensor scale, Tensor dictionary, *, "
      "ScalarType dtype=float, bool check_values=False) -> Tensor");

  // ---- gdn: the gated delta rule
  m.def(
      "gdn_chunk_scan(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, "
      "Tensor? dt_bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, "
      "float? scale=None, bool qk_l2norm=False, bool beta_sigmoid=False, "
      "bool allow_neg_eigval=False, bool state_v_first=False, bool save_residuals=True, "
      "bool check_values=False) "
      "-> (Tensor out, Tensor final_state, Tensor g_cumsum, Tensor x_inverse, Tensor rstd)");
  m.def(
      "gdn_chunk_scan_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor g_cumsum, Tensor x_inverse, Tensor rstd, Tensor? A_log=None, Tensor? dt_bias=None, "
      "Tensor? initial_state=None, Tensor? d_final_state=None, Tensor? cu_seqlens=None, *, "
      "float? scale=None, bool qk_l2norm=False, bool beta_sigmoid=False, "
      "bool allow_neg_eigval=False, bool state_v_first=False) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dA_log, "
      "Tensor ddt_bias, Tensor d_initial_state)");
  m.def(
      "gdn_recurrent_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, "
      "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? state_indices=None, "
      "Tensor? num_accepted=None, *, float? scale=None, bool qk_l2norm=False, "
      "bool beta_sigmoid=False, bool allow_neg_eigval=False, bool state_v_first=False, "
      "bool check_values=False) -> (Tensor out, Tensor new_state)");
  m.def(
      "gdn_recurrent_step_(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor(a!) state, Tensor? A_log=None, Tensor? dt_bias=None, Tensor? state_indices=None, "
      "Tensor? num_accepted=None, *, float? scale=None, bool qk_l2norm=False, "
      "bool beta_sigmoid=False, bool allow_neg_eigval=False, bool state_v_first=False, "
      "bool check_values=False) -> Tensor");
  m.def(
      "gdn_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? cu_seqlens=None, *, "
      "bool silu=False, bool check_values=False) -> Tensor");
  m.def(
      "gdn_conv1d_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? bias=None, "
      "Tensor? cu_seqlens=None, *, bool silu=False) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "gdn_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, "
      "Tensor? state_indices=None, *, bool silu=False, bool check_values=False) -> Tensor");
  m.def(
      "gdn_rms_norm(Tensor x, Tensor weight, Tensor? gate=None, *, float eps=1e-06, "
      "float weight_offset=0.0) -> (Tensor out, Tensor rstd)");
  m.def(
      "gdn_rms_norm_backward(Tensor d_out, Tensor x, Tensor weight, Tensor rstd, "
      "Tensor? gate=None, *, float weight_offset=0.0) "
      "-> (Tensor dx, Tensor dweight, Tensor dgate)");

  // ---- dense: exact attention
  m.def(
      "dense_attention(Tensor q, Tensor k, Tensor v, *, bool causal=False, float? scale=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "dense_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? d_lse=None, *, bool causal=False, float? scale=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");

  // ---- lexico: the store of codes
  m.def(
      "lexico_append(Tensor k_indices, Tensor k_coefficients, Tensor k_scale, Tensor v_indices, "
      "Tensor v_coefficients, Tensor v_scale, Tensor(a!) k_tail, Tensor(b!) v_tail, "
      "Tensor(c!) tail_lens, *, bool check_values=False) -> ()");
  m.def(
      "lexico_seal(Tensor k_tail, Tensor v_tail, *, int v_atoms) -> (Tensor k_block, Tensor "
      "v_block)");
  m.def(
      "lexico_unseal(Tensor k_block, Tensor v_block, *, int k_sparsity, int v_sparsity, "
      "int v_atoms) -> (Tensor k_tail, Tensor v_tail)");
  m.def(
      "lexico_unpack(Tensor tail, *, int kv_len) "
      "-> (Tensor indices, Tensor coefficients, Tensor scale)");
  m.def(
      "lexico_attention(Tensor q, Tensor[] k_blocks, Tensor[] v_blocks, Tensor k_tail, "
      "Tensor v_tail, Tensor tail_lens, Tensor k_dictionary, Tensor v_dictionary, "
      "Tensor? k_buffer=None, Tensor? v_buffer=None, Tensor? buffer_lens=None, "
      "Tensor? left_padding=None, *, bool causal=True, float? scale=None, int? window=None, "
      "bool check_values=False) -> (Tensor out, Tensor lse)");
}
