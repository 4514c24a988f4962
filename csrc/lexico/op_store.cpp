// The ops of the store: check arguments, allocate outputs, fill params, call the backend.
#include "lexico/op.h"

namespace kvcore::lexico {
namespace {

using binding::data;
using binding::kAnySize;
using binding::mutable_data;
using binding::new_output;
using binding::new_zero_output;

/// Codes that a store takes: int8 coefficients of the tail's sparsity.
void check_new_codes(const char* op, const char* indices_name, const Tensor& indices,
                     const char* coefficients_name, const Tensor& coefficients,
                     const char* scale_name, const Tensor& scale, const Tensor& like,
                     int64_t num_new, int64_t sparsity) {
  const int64_t batch = like.size(0), kv_heads = like.size(1);
  check_tensor(op, indices_name, indices, ScalarType::Short, {batch, kv_heads, num_new, sparsity},
               like);
  check_tensor(op, coefficients_name, coefficients, ScalarType::Char,
               {batch, kv_heads, num_new, sparsity}, like);
  check_tensor(op, scale_name, scale, ScalarType::Half, {batch, kv_heads, num_new}, like);
}

void check_v_atoms(const char* op, int64_t v_atoms) {
  KV_CHECK_RANGE(op, v_atoms, int64_t{1}, int64_t{kMaxAtoms});
}

}  // namespace

void lexico_append(const Tensor& k_indices, const Tensor& k_coefficients, const Tensor& k_scale,
                   const Tensor& v_indices, const Tensor& v_coefficients, const Tensor& v_scale,
                   const Tensor& k_tail, const Tensor& v_tail, const Tensor& tail_lens,
                   bool check_values) {
  constexpr const char* kOp = "lexico_append";
  const int64_t k_sparsity =
      check_tail(kOp, "k_tail", k_tail, kAnySize, kAnySize, kAnySize, k_tail);
  const int64_t batch = k_tail.size(0), kv_heads = k_tail.size(1);
  const int64_t v_sparsity = check_tail(kOp, "v_tail", v_tail, batch, kv_heads, kAnySize, k_tail);
  KV_CHECK_DIM(kOp, k_indices, 4);
  const int64_t num_new = k_indices.size(2);
  check_new_codes(kOp, "k_indices", k_indices, "k_coefficients", k_coefficients, "k_scale", k_scale,
                  k_tail, num_new, k_sparsity);
  check_new_codes(kOp, "v_indices", v_indices, "v_coefficients", v_coefficients, "v_scale", v_scale,
                  k_tail, num_new, v_sparsity);
  check_tensor(kOp, "tail_lens", tail_lens, ScalarType::Int, {batch}, k_tail);
  // Before lengths are read that may be the bytes of something else.
  binding::check_disjoint(kOp, {{"k_tail", k_tail}, {"v_tail", v_tail}, {"tail_lens", tail_lens}},
                          {{"k_indices", k_indices},
                           {"k_coefficients", k_coefficients},
                           {"k_scale", k_scale},
                           {"v_indices", v_indices},
                           {"v_coefficients", v_coefficients},
                           {"v_scale", v_scale}});
  const int64_t k_tiles = k_tail.size(2), v_tiles = v_tail.size(2);
  const int64_t capacity = std::min<int64_t>({k_tiles, v_tiles, kBlockTiles}) * kTileTokens;
  const HostValues<> lens =
      binding::check_lens(kOp, "tail_lens", tail_lens, k_tail, batch, capacity, check_values);
  for (int64_t b = 0; lens.readable() && b < batch; ++b) {
    KV_CHECK(num_new <= capacity - lens[b], kOp, "k_indices",
             "of at most " + std::to_string(capacity - lens[b]) + " new tokens for sequence " +
                 std::to_string(b),
             num_new);
  }
  if (num_new == 0 || batch == 0) return;
  backend::append({.k_indices = data<int16_t>(k_indices),
                   .v_indices = data<int16_t>(v_indices),
                   .k_coefficients = data<int8_t>(k_coefficients),
                   .v_coefficients = data<int8_t>(v_coefficients),
                   .k_scale = data<uint16_t>(k_scale),
                   .v_scale = data<uint16_t>(v_scale),
                   .batch = batch,
                   .kv_heads = kv_heads,
                   .num_new = num_new,
                   .k_sparsity = k_sparsity,
                   .v_sparsity = v_sparsity,
                   .k_tail = mutable_data<uint8_t>(k_tail),
                   .v_tail = mutable_data<uint8_t>(v_tail),
                   .tail_lens = mutable_data<int32_t>(tail_lens),
                   .k_tiles = k_tiles,
                   .v_tiles = v_tiles});
}

std::tuple<Tensor, Tensor> lexico_seal(const Tensor& k_tail, const Tensor& v_tail,
                                       int64_t v_atoms) {
  constexpr const char* kOp = "lexico_seal";
  const int64_t k_sparsity =
      check_tail(kOp, "k_tail", k_tail, kAnySize, kAnySize, kBlockTiles, k_tail);
  const int64_t batch = k_tail.size(0), kv_heads = k_tail.size(1);
  const int64_t v_sparsity =
      check_tail(kOp, "v_tail", v_tail, batch, kv_heads, kBlockTiles, k_tail);
  check_v_atoms(kOp, v_atoms);
  SealParams params = {.k_tail = data<uint8_t>(k_tail),
                       .v_tail = data<uint8_t>(v_tail),
                       .batch = batch,
                       .kv_heads = kv_heads,
                       .k_sparsity = k_sparsity,
                       .v_sparsity = v_sparsity,
                       .v_atoms = v_atoms,
                       .k_block = nullptr,
                       .v_block = nullptr,
                       .k_bytes = 0,
                       .v_bytes = 0};
  const SealSizes sizes = backend::seal_sizes(params);
  KV_CHECK(sizes.bad_index < 0, kOp, "v_tail", "codes over " + std::to_string(v_atoms) + " atoms",
           "the index " + std::to_string(sizes.bad_index));
  const Tensor k_block =
      new_zero_output(kOp, "k_block", k_tail, {batch, kv_heads, sizes.k_bytes}, ScalarType::Byte);
  const Tensor v_block =
      new_zero_output(kOp, "v_block", k_tail, {batch, kv_heads, sizes.v_bytes}, ScalarType::Byte);
  params.k_block = mutable_data<uint8_t>(k_block);
  params.v_block = mutable_data<uint8_t>(v_block);
  params.k_bytes = sizes.k_bytes;
  params.v_bytes = sizes.v_bytes;
  backend::seal(params);
  return {k_block, v_block};
}

std::tuple<Tensor, Tensor> lexico_unseal(const Tensor& k_block, const Tensor& v_block,
                                         int64_t k_sparsity, int64_t v_sparsity, int64_t v_atoms) {
  constexpr const char* kOp = "lexico_unseal";
  KV_CHECK_RANGE(kOp, k_sparsity, int64_t{1}, int64_t{kMaxSparsity});
  KV_CHECK_RANGE(kOp, v_sparsity, int64_t{1}, int64_t{kMaxSparsity});
  check_v_atoms(kOp, v_atoms);
  KV_CHECK_DIM(kOp, k_block, 3);
  const int64_t batch = k_block.size(0), kv_heads = k_block.size(1);
  const Block k = check_block(kOp, "k_block", k_block, batch, kv_heads, kBlockTiles, k_block);
  const Block v =
      check_block(kOp, "v_block", v_block, batch, kv_heads, v_block_bytes(v_atoms, 0), k_block);
  const Tensor k_tail =
      new_zero_output(kOp, "k_tail", k_block,
                      {batch, kv_heads, kBlockTiles, tile_bytes(k_sparsity)}, ScalarType::Byte);
  const Tensor v_tail =
      new_zero_output(kOp, "v_tail", k_block,
                      {batch, kv_heads, kBlockTiles, tile_bytes(v_sparsity)}, ScalarType::Byte);
  backend::unseal({.k_block = k.data,
                   .v_block = v.data,
                   .k_bytes = k.bytes,
                   .v_bytes = v.bytes,
                   .batch = batch,
                   .kv_heads = kv_heads,
                   .k_sparsity = k_sparsity,
                   .v_sparsity = v_sparsity,
                   .v_atoms = v_atoms,
                   .k_tail = mutable_data<uint8_t>(k_tail),
                   .v_tail = mutable_data<uint8_t>(v_tail)});
  return {k_tail, v_tail};
}

std::tuple<Tensor, Tensor, Tensor> lexico_unpack(const Tensor& tail, int64_t kv_len) {
  constexpr const char* kOp = "lexico_unpack";
  const int64_t sparsity = check_tail(kOp, "tail", tail, kAnySize, kAnySize, kAnySize, tail);
  const int64_t batch = tail.size(0), kv_heads = tail.size(1), tiles = tail.size(2);
  KV_CHECK_RANGE(kOp, kv_len, int64_t{0}, tiles * kTileTokens);
  const Tensor indices =
      new_output(kOp, "indices", tail, {batch, kv_heads, kv_len, sparsity}, ScalarType::Short);
  const Tensor coefficients =
      new_output(kOp, "coefficients", tail, {batch, kv_heads, kv_len, sparsity}, ScalarType::Char);
  const Tensor scale = new_output(kOp, "scale", tail, {batch, kv_heads, kv_len}, ScalarType::Half);
  if (scale.numel() > 0) {
    backend::unpack({.tail = data<uint8_t>(tail),
                     .batch = batch,
                     .kv_heads = kv_heads,
                     .tiles = tiles,
                     .sparsity = sparsity,
                     .kv_len = kv_len,
                     .indices = mutable_data<int16_t>(indices),
                     .coefficients = mutable_data<int8_t>(coefficients),
                     .scale = mutable_data<uint16_t>(scale)});
  }
  return {indices, coefficients, scale};
}

}  // namespace kvcore::lexico
