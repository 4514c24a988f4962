// lexico_attention: check arguments, allocate outputs, fill params, call the backend.
#include <algorithm>

#include "lexico/op.h"

namespace kvcore::lexico {
namespace {

using binding::check_lens;
using binding::data;
using binding::kAnySize;
using binding::new_output;

constexpr const char* kOp = "lexico_attention";
std::vector<Block> check_blocks(const char* argument, const std::vector<Tensor>& blocks,
                                const Tensor& q, int64_t kv_heads, int64_t min_bytes) {
  std::vector<Block> result;
  result.reserve(blocks.size());
  for (const Tensor& block : blocks) {
    const int64_t i = static_cast<int64_t>(result.size());
    result.push_back(
        check_block(kOp, element_name(argument, {i}), block, q.size(0), kv_heads, min_bytes, q));
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> lexico_attention(
    const Tensor& q, const std::vector<Tensor>& k_blocks, const std::vector<Tensor>& v_blocks,
    const Tensor& k_tail, const Tensor& v_tail, const Tensor& tail_lens, const Tensor& k_dictionary,
    const Tensor& v_dictionary, const std::optional<Tensor>& k_buffer,
    const std::optional<Tensor>& v_buffer, const std::optional<Tensor>& buffer_lens,
    const std::optional<Tensor>& left_padding, bool causal, std::optional<double> scale,
    std::optional<int64_t> window, bool check_values) {
  check_input(kOp, "q", q);
  const int64_t batch = q.size(0), q_heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  const int64_t k_atoms = check_dictionary(kOp, "k_dictionary", k_dictionary, head_dim, q);
  const int64_t v_atoms = check_dictionary(kOp, "v_dictionary", v_dictionary, head_dim, q);
  const int64_t k_sparsity = check_tail(kOp, "k_tail", k_tail, batch, kAnySize, kAnySize, q);
  const int64_t kv_heads = k_tail.size(1);
  binding::check_heads(kOp, "k_tail", q, kv_heads);
  const int64_t v_sparsity = check_tail(kOp, "v_tail", v_tail, batch, kv_heads, kAnySize, q);
  KV_CHECK(k_blocks.size() == v_blocks.size(), kOp, "v_blocks",
           "as many blocks as k_blocks, " + std::to_string(k_blocks.size()), v_blocks.size());
  const std::vector<Block> k = check_blocks("k_blocks", k_blocks, q, kv_heads, kBlockTiles);
  const std::vector<Block> v =
      check_blocks("v_blocks", v_blocks, q, kv_heads, v_block_bytes(v_atoms, 0));
  const int64_t num_blocks = static_cast<int64_t>(k.size());
  const int64_t k_tiles = k_tail.size(2), v_tiles = v_tail.size(2);
  const int64_t capacity = std::min<int64_t>({k_tiles, v_tiles, kBlockTiles}) * kTileTokens;
  check_lens(kOp, "tail_lens", tail_lens, q, batch, capacity, check_values);

  KV_CHECK(k_buffer.has_value() == v_buffer.has_value(), kOp, "v_buffer",
           k_buffer ? "given, as k_buffer is" : "None, as k_buffer is",
           v_buffer ? "a tensor" : "None");
  KV_CHECK(!buffer_lens || k_buffer, kOp, "buffer_lens", "None without k_buffer", "a tensor");
  const int64_t buffer_len = k_buffer && k_buffer->dim() == 4 ? k_buffer->size(2) : 0;
  InputView k_view = {}, v_view = {};
  if (k_buffer) {
    KV_CHECK_SHAPE(kOp, *k_buffer, batch, kv_heads, kAnySize, head_dim);
    KV_CHECK_SHAPE(kOp, *v_buffer, batch, kv_heads, buffer_len, head_dim);
    KV_CHECK_SAME_DTYPE(kOp, *k_buffer, q);
    KV_CHECK_SAME_DTYPE(kOp, *v_buffer, q);
    KV_CHECK_SAME_DEVICE(kOp, *k_buffer, q);
    KV_CHECK_SAME_DEVICE(kOp, *v_buffer, q);
    k_view = binding::input_view(kOp, "k_buffer", *k_buffer);
    v_view = binding::input_view(kOp, "v_buffer", *v_buffer);
  }
  if (buffer_lens) check_lens(kOp, "buffer_lens", *buffer_lens, q, batch, buffer_len, check_values);
  // Wide enough for any context that the tensors could hold; attention itself cuts it.
  if (left_padding) {
    check_lens(kOp, "left_padding", *left_padding, q, batch,
               num_blocks * kBlockTokens + capacity + buffer_len, check_values);
  }
  const float factor = binding::check_scale(kOp, scale, head_dim);
  const int64_t keys = binding::check_window(kOp, window, causal);

  const Tensor out = new_output(kOp, "out", q, {batch, q_heads, q_len, head_dim}, q.scalar_type());
  const Tensor lse = new_output(kOp, "lse", q, {batch, q_heads, q_len}, ScalarType::Float);
  if (lse.numel() > 0) {
    backend::attention({.q = binding::input_view(kOp, "q", q),
                        .k_blocks = k.data(),
                        .v_blocks = v.data(),
                        .k_tail = data<uint8_t>(k_tail),
                        .v_tail = data<uint8_t>(v_tail),
                        .tail_lens = data<int32_t>(tail_lens),
                        .k_dictionary = data<float>(k_dictionary),
                        .v_dictionary = data<float>(v_dictionary),
                        .k_buffer = k_view,
                        .v_buffer = v_view,
                        .buffer_lens = data<int32_t>(buffer_lens),
                        .left_padding = data<int32_t>(left_padding),
                        .batch = batch,
                        .q_heads = q_heads,
                        .kv_heads = kv_heads,
                        .q_len = q_len,
                        .head_dim = head_dim,
                        .num_blocks = num_blocks,
                        .k_tiles = k_tiles,
                        .v_tiles = v_tiles,
                        .k_sparsity = k_sparsity,
                        .v_sparsity = v_sparsity,
                        .k_atoms = k_atoms,
                        .v_atoms = v_atoms,
                        .buffer_len = buffer_len,
                        .scale = factor,
                        .causal = causal,
                        .window = keys,
                        .out = binding::output_view(kOp, "out", out),
                        .lse = binding::mutable_data<float>(lse)});
  }
  return {out, lse};
}

}  // namespace kvcore::lexico
