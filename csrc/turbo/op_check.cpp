// Checks that the ops of the family share. Every one throws before anything is written.
#include <limits>

#include "turbo/op.h"

namespace kvcore::turbo {
namespace {

using binding::kAnySize;

uint8_t* bytes(const Tensor& tensor, Access access) {
  // A mutable pointer would make a copy of a lazily cloned tensor, so readers must not ask for it.
  return access == Access::kWrite ? binding::mutable_data<uint8_t>(tensor)
                                  : const_cast<uint8_t*>(binding::data<uint8_t>(tensor));
}

Slab check_slab(const char* op, const Tensor& slab, int64_t slab_idx, Access access,
                const Tensor& like, int64_t head_dim) {
  const auto name = [slab_idx] { return element_name("pool", {slab_idx}); };
  KV_CHECK(slab.scalar_type() == ScalarType::Byte, op, name(), "uint8",
           binding::format_dtype(slab.scalar_type()));
  KV_CHECK(binding::same_device(slab, like), op, name(), "on " + binding::format_device(like),
           binding::format_device(slab));
  int bits = 0;
  for (const int width : {8, 4, 2}) {
    if (slab.dim() == 2 && slab.size(1) == block_bytes(width, head_dim)) bits = width;
  }
  KV_CHECK(bits != 0, op, name(),
           binding::format_shape({kAnySize, block_bytes(8, head_dim)}) + ", " +
               binding::format_shape({kAnySize, block_bytes(4, head_dim)}) + " or " +
               binding::format_shape({kAnySize, block_bytes(2, head_dim)}),
           binding::format_shape(slab));
  KV_CHECK(slab.size(0) <= kMaxSlabBlocks, op, name(),
           "at most " + std::to_string(kMaxSlabBlocks) + " blocks", slab.size(0));
  KV_CHECK(slab.is_contiguous(), op, name(), "contiguous",
           "strides " + binding::format_shape(slab.strides()));
  return {.data = bytes(slab, access), .num_blocks = slab.size(0), .bits = bits};
}

}  // namespace

void check_kv(const char* op, const Tensor& k, const Tensor& v) {
  binding::check_input(op, "k", k);
  KV_CHECK_SHAPE(op, v, k.size(0), k.size(1), k.size(2), k.size(3));
  KV_CHECK_SAME_DTYPE(op, v, k);
  KV_CHECK_SAME_DEVICE(op, v, k);
}

Calibration check_calibration(const char* op, const std::optional<Tensor>& k_balance,
                              const std::optional<Tensor>& k_mean, const Tensor& like,
                              int64_t batch, int64_t kv_heads, int64_t head_dim) {
  const auto shape = {batch, kv_heads, head_dim};
  if (k_balance) check_tensor(op, "k_balance", *k_balance, ScalarType::Float, shape, like);
  if (k_mean) check_tensor(op, "k_mean", *k_mean, ScalarType::Float, shape, like);
  return {.k_balance = binding::data<float>(k_balance), .k_mean = binding::data<float>(k_mean)};
}

HostValues<> check_left_padding(const char* op, const std::optional<Tensor>& left_padding,
                                const Tensor& like, int64_t batch, int64_t num_tokens,
                                bool wanted) {
  if (!left_padding) return {};
  return binding::check_lens(op, "left_padding", *left_padding, like, batch, num_tokens, wanted);
}

int64_t check_store_head_dim(const char* op, const Tensor& block_table, const Tensor& tail) {
  KV_CHECK_DIM(op, block_table, 4);
  for (const int64_t head_dim : {64, 96, 128, 256}) {
    if (tail.dim() == 5 && tail.size(4) == block_bytes(8, head_dim)) return head_dim;
  }
  KV_CHECK(false, op, "tail",
           "[batch, 2, kv_heads, 2, bytes] with bytes one of " +
               binding::format_list<int64_t>({block_bytes(8, 64), block_bytes(8, 96),
                                              block_bytes(8, 128), block_bytes(8, 256)}),
           binding::format_shape(tail));
}

Store check_store(const char* op, const StoreTensors& tensors, const Tensor& like, int64_t batch,
                  int64_t kv_heads, int64_t head_dim, std::vector<Slab>& slabs) {
  const auto& [pool, block_table, tail, seq_lens, pool_access, tail_access] = tensors;
  check_tensor(op, "block_table", block_table, ScalarType::Int, {batch, 2, kv_heads, kAnySize},
               like);
  check_tensor(op, "tail", tail, ScalarType::Byte,
               {batch, 2, kv_heads, kTailSlots, block_bytes(8, head_dim)}, like);
  check_tensor(op, "seq_lens", seq_lens, ScalarType::Int, {batch}, like);
  KV_CHECK(pool.size() <= kMaxSlabs, op, "pool", "at most " + std::to_string(kMaxSlabs) + " slabs",
           pool.size());
  slabs.clear();
  slabs.reserve(pool.size());
  for (const Tensor& slab : pool) {
    slabs.push_back(
        check_slab(op, slab, static_cast<int64_t>(slabs.size()), pool_access, like, head_dim));
  }
  return {.slabs = slabs.data(),
          .num_slabs = static_cast<int64_t>(slabs.size()),
          .block_table = binding::data<int32_t>(block_table),
          .max_pages = block_table.size(3),
          .tail = bytes(tail, tail_access),
          .seq_lens = reinterpret_cast<int32_t*>(bytes(seq_lens, tail_access)),
          .batch = batch,
          .kv_heads = kv_heads,
          .head_dim = head_dim};
}

int64_t max_seq_len(const Store& store) {
  // seq_lens is int32. Dividing first keeps a huge max_pages (of an empty table) from overflowing.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (store.max_pages >= kLimit / kPageTokens) return kLimit;
  return (store.max_pages + 1) * kPageTokens - 1;
}

void check_seq_lens(const char* op, const HostValues<>& seq_lens, const Store& store) {
  const int64_t limit = max_seq_len(store);
  for (int64_t b = 0; b < store.batch; ++b) {
    KV_CHECK(seq_lens[b] >= 0 && seq_lens[b] <= limit, op, element_name("seq_lens", {b}),
             "in [0, " + std::to_string(limit) + "]", seq_lens[b]);
  }
}

void check_entries(const char* op, const HostValues<>& block_table, const Store& store,
                   int64_t batch_idx, int64_t page_begin, int64_t page_end) {
  for (int64_t kv = 0; kv < 2; ++kv) {
    for (int64_t head = 0; head < store.kv_heads; ++head) {
      const int64_t row = ((batch_idx * 2 + kv) * store.kv_heads + head) * store.max_pages;
      for (int64_t page = page_begin; page < page_end; ++page) {
        const int32_t entry = block_table[row + page];
        const bool exists = entry >= 0 && entry_slab(entry) < store.num_slabs &&
                            entry_index(entry) < store.slabs[entry_slab(entry)].num_blocks;
        KV_CHECK(exists, op, element_name("block_table", {batch_idx, kv, head, page}),
                 "the entry of a block of pool", entry);
      }
    }
  }
}

}  // namespace kvcore::turbo
