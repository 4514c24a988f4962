// The attention ops: check arguments, allocate outputs, fill params, call the backend.
#include <algorithm>

#include "turbo/op.h"

namespace kvcore::turbo {
namespace {

using binding::check_cu_seqlens;
using binding::check_heads;
using binding::check_input;
using binding::data;
using binding::input_view;
using binding::new_output;
using binding::output_view;

Softmax check_softmax(const char* op, bool causal, std::optional<double> scale,
                      std::optional<int64_t> window, std::optional<double> sas_threshold,
                      int64_t head_dim) {
  const float factor = binding::check_scale(op, scale, head_dim);
  const int64_t keys = binding::check_window(op, window, causal);
  if (sas_threshold) {
    // Below -87 the exponentials themselves leave fp32; negated, so that NaN is rejected.
    KV_CHECK(*sas_threshold >= -87 && *sas_threshold < 0, op, "sas_threshold",
             "in [-87, 0) or None", *sas_threshold);
  }
  return {.scale = factor,
          .causal = causal,
          .window = keys,
          .exact = !sas_threshold,
          .sas_threshold = static_cast<float>(sas_threshold.value_or(0))};
}

}  // namespace

std::tuple<Tensor, Tensor> turbo_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_balance,
    const std::optional<Tensor>& k_mean, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, bool causal, std::optional<double> scale,
    std::optional<int64_t> window, std::optional<double> sas_threshold, bool check_values) {
  constexpr const char* kOp = "turbo_attention";
  check_input(kOp, "q", q);
  check_kv(kOp, k, v);
  const int64_t batch = q.size(0), q_heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(1), kv_len = k.size(2);
  KV_CHECK_SHAPE(kOp, k, batch, binding::kAnySize, binding::kAnySize, head_dim);
  KV_CHECK_SAME_DTYPE(kOp, k, q);
  KV_CHECK_SAME_DEVICE(kOp, k, q);
  check_heads(kOp, "k", q, kv_heads);
  const Calibration calibration =
      check_calibration(kOp, k_balance, k_mean, q, batch, kv_heads, head_dim);
  const Softmax softmax = check_softmax(kOp, causal, scale, window, sas_threshold, head_dim);
  int64_t num_seqs = 0;
  KV_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), kOp,
           cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
           std::string("given with ") + (cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k"), "None");
  if (cu_seqlens_q) {
    KV_CHECK(batch == 1, kOp, "q", "of batch 1 with cu_seqlens_q", batch);
    check_cu_seqlens(kOp, "cu_seqlens_q", *cu_seqlens_q, q, q_len, check_values);
    check_cu_seqlens(kOp, "cu_seqlens_k", *cu_seqlens_k, q, kv_len, check_values);
    KV_CHECK_SHAPE(kOp, *cu_seqlens_k, cu_seqlens_q->size(0));
    num_seqs = cu_seqlens_q->size(0) - 1;
  }

  Tensor out = new_output(kOp, "out", q, {batch, q_heads, q_len, head_dim}, q.scalar_type());
  Tensor lse = new_output(kOp, "lse", q, {batch, q_heads, q_len}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  backend::attention({.q = input_view(kOp, "q", q),
                      .k = input_view(kOp, "k", k),
                      .v = input_view(kOp, "v", v),
                      .batch = batch,
                      .q_heads = q_heads,
                      .kv_heads = kv_heads,
                      .q_len = q_len,
                      .kv_len = kv_len,
                      .head_dim = head_dim,
                      .cu_seqlens_q = data<int32_t>(cu_seqlens_q),
                      .cu_seqlens_k = data<int32_t>(cu_seqlens_k),
                      .num_seqs = num_seqs,
                      .calibration = calibration,
                      .softmax = softmax,
                      .out = output_view(kOp, "out", out),
                      .lse = binding::mutable_data<float>(lse)});
  return {out, lse};
}

std::tuple<Tensor, Tensor> turbo_decode(const Tensor& q, const std::vector<Tensor>& pool,
                                        const Tensor& block_table, const Tensor& tail,
                                        const Tensor& seq_lens,
                                        const std::optional<Tensor>& k_balance,
                                        const std::optional<Tensor>& k_mean, bool causal,
                                        std::optional<double> scale, std::optional<int64_t> window,
                                        std::optional<double> sas_threshold, bool check_values) {
  constexpr const char* kOp = "turbo_decode";
  check_input(kOp, "q", q);
  const int64_t batch = q.size(0), q_heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  KV_CHECK_DIM(kOp, block_table, 4);
  const int64_t kv_heads = block_table.size(2);
  check_heads(kOp, "block_table", q, kv_heads);
  std::vector<Slab> slabs;
  const Store store =
      check_store(kOp, {pool, block_table, tail, seq_lens, Access::kRead, Access::kRead}, q, batch,
                  kv_heads, head_dim, slabs);
  const Calibration calibration =
      check_calibration(kOp, k_balance, k_mean, q, batch, kv_heads, head_dim);
  const Softmax softmax = check_softmax(kOp, causal, scale, window, sas_threshold, head_dim);

  int64_t longest = max_seq_len(store);
  const HostValues<> lens(seq_lens, check_values), table(block_table, check_values);
  if (lens.readable()) {
    check_seq_lens(kOp, lens, store);
    longest = 0;
    for (int64_t b = 0; b < batch; ++b) {
      longest = std::max<int64_t>(longest, lens[b]);
      // Pages before the window are never read: their blocks may be gone.
      const int64_t first_key =
          softmax.window > 0 ? lens[b] - q_len + 1 - std::min<int64_t>(softmax.window, lens[b]) : 0;
      check_entries(kOp, table, store, b, std::max<int64_t>(first_key, 0) / kPageTokens,
                    lens[b] / kPageTokens);
    }
  }

  Tensor out = new_output(kOp, "out", q, {batch, q_heads, q_len, head_dim}, q.scalar_type());
  Tensor lse = new_output(kOp, "lse", q, {batch, q_heads, q_len}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  backend::decode({.q = input_view(kOp, "q", q),
                   .q_heads = q_heads,
                   .q_len = q_len,
                   .calibration = calibration,
                   .store = store,
                   .softmax = softmax,
                   .out = output_view(kOp, "out", out),
                   .lse = binding::mutable_data<float>(lse),
                   .max_seq_len = longest});
  return {out, lse};
}

}  // namespace kvcore::turbo
