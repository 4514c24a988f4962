// The ops of the store: check arguments, allocate outputs, fill params, call the backend.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "turbo/op.h"

namespace kvcore::turbo {
namespace {

using binding::check_input;
using binding::data;
using binding::input_view;
using binding::mutable_data;
using binding::new_output;
using binding::new_zero_output;
using binding::output_view;

constexpr int kWidths[] = {8, 4, 2};
constexpr const char* kPools[] = {"pool8", "pool4", "pool2"};
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();  // seq_lens is int32

float check_tail_margin(const char* op, double tail_margin) {
  const float margin = static_cast<float>(tail_margin);
  // Negated, so that NaN is rejected.
  KV_CHECK(tail_margin >= 1 && std::isfinite(margin), op, "tail_margin", "finite and at least 1",
           tail_margin);
  return margin;
}

// One width for all heads or one for each.
void check_bits(const char* op, const char* argument, const std::vector<int64_t>& bits,
                int64_t kv_heads) {
  const int64_t count = static_cast<int64_t>(bits.size());
  KV_CHECK(count == 1 || count == kv_heads, op, argument,
           "1 or " + std::to_string(kv_heads) + " widths", count);
  for (int64_t i = 0; i < count; ++i) {
    KV_CHECK(bits[i] == 8 || bits[i] == 4 || bits[i] == 2, op, element_name(argument, {i}),
             "one of 8, 4, 2", bits[i]);
  }
}

// Everything about the values of an append: lengths, and the entries that will be written.
void check_append_values(const char* op, const AppendParams& p, const HostValues<>& seq_lens,
                         const HostValues<>& block_table, const HostValues<>& left_padding) {
  const Store& store = p.store;
  check_seq_lens(op, seq_lens, store);
  std::vector<int32_t> written;
  for (int64_t b = 0; b < store.batch; ++b) {
    const int64_t seq_len = seq_lens[b];
    const int64_t num_new = p.num_new - (left_padding.readable() ? left_padding[b] : 0);
    KV_CHECK(num_new <= kMaxTokens - seq_len, op, "k",
             "at most " + std::to_string(kMaxTokens - seq_len) + " new tokens for sequence " +
                 std::to_string(b),
             num_new);
    const int64_t page_begin = seq_len / kPageTokens;
    const int64_t page_end = (seq_len + num_new) / kPageTokens;
    KV_CHECK(page_end <= store.max_pages, op, "block_table",
             "of at least " + std::to_string(page_end) + " pages for the " +
                 std::to_string(seq_len + num_new) + " tokens of sequence " + std::to_string(b),
             store.max_pages);
    check_entries(op, block_table, store, b, page_begin, page_end);
    for (int64_t row = b * 2 * store.kv_heads; row < (b + 1) * 2 * store.kv_heads; ++row) {
      for (int64_t page = page_begin; page < page_end; ++page) {
        written.push_back(block_table[row * store.max_pages + page]);
      }
    }
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  KV_CHECK(twice == written.end(), op, "block_table",
           "distinct entries for the pages that become full", std::to_string(*twice) + " twice");
}

// Which pages turbo_quantize fills, and how wide they are.
struct QuantizePlan {
  int64_t batch, kv_heads, kv_len, sink_pages;
  const HostValues<>& padding;
  const std::vector<int64_t>* bits[2];  // of K and V: one for all heads or one for each

  int64_t max_pages() const { return kv_len / kPageTokens; }
  int64_t pages(int64_t batch_idx) const {
    return (kv_len - (padding.readable() ? padding[batch_idx] : 0)) / kPageTokens;
  }
};

// Position in kWidths.
int width_index(int64_t bits) { return bits == 8 ? 0 : bits == 4 ? 1 : 2; }

// Blocks of each width. An expanded input can have more sequences and heads than could be counted
// one by one, so only what lies in memory is looped over.
std::array<int64_t, 3> count_blocks(const QuantizePlan& plan) {
  const int64_t most_sinks = std::min(plan.sink_pages, plan.max_pages());
  int64_t sinks = plan.batch * most_sinks, others = plan.batch * plan.max_pages() - sinks;
  if (plan.padding.readable()) {
    sinks = others = 0;
    for (int64_t b = 0; b < plan.batch; ++b) {
      sinks += std::min(most_sinks, plan.pages(b));
      others += std::max<int64_t>(plan.pages(b) - most_sinks, 0);
    }
  }
  std::array<int64_t, 3> counts{2 * plan.kv_heads * sinks, 0, 0};
  for (const std::vector<int64_t>* widths : plan.bits) {
    const int64_t heads = widths->size() == 1 ? plan.kv_heads : 1;
    for (const int64_t bits : *widths) counts[width_index(bits)] += heads * others;
  }
  return counts;
}

// Pages in the order of (batch, K|V, head, page), each taking the next block of its width.
void fill_table(const QuantizePlan& plan, const int64_t (&slab_of_width)[3], int32_t* entries) {
  int64_t next[3] = {};
  for (int64_t row = 0; row < plan.batch * 2 * plan.kv_heads; ++row) {
    const int64_t head = row % plan.kv_heads;
    const std::vector<int64_t>& widths = *plan.bits[row / plan.kv_heads % 2];
    const int64_t bits = widths[widths.size() == 1 ? 0 : head];
    const int64_t pages = plan.pages(row / (2 * plan.kv_heads));
    for (int64_t page = 0; page < plan.max_pages(); ++page, ++entries) {
      const int width = width_index(page < plan.sink_pages ? 8 : bits);
      *entries = page < pages ? block_entry(slab_of_width[width], next[width]++) : -1;
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> turbo_calibrate(const Tensor& k,
                                           const std::optional<Tensor>& left_padding, bool balance,
                                           bool subtract_mean, int64_t rotary_dim,
                                           bool check_values) {
  constexpr const char* kOp = "turbo_calibrate";
  check_input(kOp, "k", k);
  const int64_t batch = k.size(0), kv_heads = k.size(1), kv_len = k.size(2), head_dim = k.size(3);
  check_left_padding(kOp, left_padding, k, batch, kv_len, check_values);
  KV_CHECK(rotary_dim == -1 || (rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0),
           kOp, "rotary_dim", "-1 or an even number in [0, " + std::to_string(head_dim) + "]",
           rotary_dim);

  Tensor k_balance =
      new_output(kOp, "k_balance", k, {batch, kv_heads, head_dim}, ScalarType::Float);
  Tensor k_mean = new_output(kOp, "k_mean", k, {batch, kv_heads, head_dim}, ScalarType::Float);
  backend::calibrate({.k = input_view(kOp, "k", k),
                      .left_padding = data<int32_t>(left_padding),
                      .batch = batch,
                      .kv_heads = kv_heads,
                      .kv_len = kv_len,
                      .head_dim = head_dim,
                      .rotary_dim = rotary_dim == -1 ? head_dim : rotary_dim,
                      .balance = balance,
                      .subtract_mean = subtract_mean,
                      .k_balance = mutable_data<float>(k_balance),
                      .k_mean = mutable_data<float>(k_mean)});
  return {k_balance, k_mean};
}

Tensor turbo_head_priority(const Tensor& x, const std::optional<Tensor>& left_padding,
                           bool check_values) {
  constexpr const char* kOp = "turbo_head_priority";
  check_input(kOp, "x", x);
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2);
  check_left_padding(kOp, left_padding, x, batch, tokens, check_values);

  Tensor priority = new_output(kOp, "priority", x, {batch, heads}, ScalarType::Float);
  backend::head_priority({.x = input_view(kOp, "x", x),
                          .left_padding = data<int32_t>(left_padding),
                          .batch = batch,
                          .heads = heads,
                          .tokens = tokens,
                          .head_dim = x.size(3),
                          .priority = mutable_data<float>(priority)});
  return priority;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> turbo_quantize(
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_balance,
    const std::optional<Tensor>& k_mean, const std::optional<Tensor>& left_padding,
    const std::vector<int64_t>& k_bits, const std::vector<int64_t>& v_bits, int64_t sink_pages,
    double tail_margin, bool) {
  constexpr const char* kOp = "turbo_quantize";
  check_kv(kOp, k, v);
  const int64_t batch = k.size(0), kv_heads = k.size(1), kv_len = k.size(2), head_dim = k.size(3);
  const Calibration calibration =
      check_calibration(kOp, k_balance, k_mean, k, batch, kv_heads, head_dim);
  KV_CHECK(kv_len <= kMaxTokens, kOp, "k", "at most " + std::to_string(kMaxTokens) + " tokens",
           kv_len);
  check_bits(kOp, "k_bits", k_bits, kv_heads);
  check_bits(kOp, "v_bits", v_bits, kv_heads);
  KV_CHECK(sink_pages >= 0, kOp, "sink_pages", "at least 0", sink_pages);
  const float margin = check_tail_margin(kOp, tail_margin);
  // The sizes of the outputs depend on the padding, so it is read whatever check_values says.
  const HostValues<> padding = check_left_padding(kOp, left_padding, k, batch, kv_len, true);

  const QuantizePlan plan{batch, kv_heads, kv_len, sink_pages, padding, {&k_bits, &v_bits}};
  const std::array<int64_t, 3> num_blocks = count_blocks(plan);
  for (int width = 0; width < 3; ++width) {
    KV_CHECK(num_blocks[width] <= kMaxSlabBlocks, kOp, "k",
             "of at most " + std::to_string(kMaxSlabBlocks) + " pages of " +
                 std::to_string(kWidths[width]) + " bit",
             num_blocks[width]);
  }
  std::vector<Slab> slabs;
  std::vector<Tensor> pools;
  int64_t slab_of_width[3];
  for (int width = 0; width < 3; ++width) {
    const int bits = kWidths[width];
    pools.push_back(new_output(kOp, kPools[width], k,
                               {num_blocks[width], block_bytes(bits, head_dim)}, ScalarType::Byte));
    slab_of_width[width] = static_cast<int64_t>(slabs.size());
    if (num_blocks[width] == 0) continue;
    slabs.push_back({mutable_data<uint8_t>(pools.back()), num_blocks[width], bits});
  }
  const int64_t max_pages = plan.max_pages();
  Tensor host_table =
      new_output(kOp, "block_table", k, {batch, 2, kv_heads, max_pages}, ScalarType::Int,
                 torch::stable::Device(torch::headeronly::DeviceType::CPU));
  if (max_pages > 0) fill_table(plan, slab_of_width, mutable_data<int32_t>(host_table));
  Tensor block_table = k.is_cpu() ? host_table : torch::stable::to(host_table, k.device());

  const int64_t slot_bytes = block_bytes(8, head_dim);
  Tensor tail = new_zero_output(kOp, "tail", k, {batch, 2, kv_heads, kTailSlots, slot_bytes},
                                ScalarType::Byte);
  // -1 in every header's page_idx: no slot holds a page.
  torch::stable::fill_(torch::stable::narrow(tail, 4, offsetof(BlockHeader, page_idx), 4), 255);
  Tensor tail_scale =
      new_zero_output(kOp, "tail_scale", k, {batch, 2, kv_heads}, ScalarType::Float);
  Tensor clamp_count =
      new_zero_output(kOp, "clamp_count", k, {batch, 2, kv_heads}, ScalarType::Long);
  Tensor seq_lens = new_zero_output(kOp, "seq_lens", k, {batch}, ScalarType::Int);
  backend::append({.k = input_view(kOp, "k", k),
                   .v = input_view(kOp, "v", v),
                   .num_new = kv_len,
                   .left_padding = data<int32_t>(left_padding),
                   .calibration = calibration,
                   .store = {.slabs = slabs.data(),
                             .num_slabs = static_cast<int64_t>(slabs.size()),
                             .block_table = data<int32_t>(block_table),
                             .max_pages = max_pages,
                             .tail = mutable_data<uint8_t>(tail),
                             .seq_lens = mutable_data<int32_t>(seq_lens),
                             .batch = batch,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim},
                   .tail_margin = margin,
                   .tail_scale = mutable_data<float>(tail_scale),
                   .clamp_count = mutable_data<int64_t>(clamp_count)});
  return {pools[0], pools[1], pools[2], block_table, tail, tail_scale, clamp_count, seq_lens};
}

void turbo_append(const Tensor& k, const Tensor& v, const std::vector<Tensor>& pool,
                  const Tensor& block_table, const Tensor& tail, const Tensor& tail_scale,
                  const Tensor& clamp_count, const Tensor& seq_lens,
                  const std::optional<Tensor>& k_balance, const std::optional<Tensor>& k_mean,
                  const std::optional<Tensor>& left_padding, double tail_margin,
                  bool check_values) {
  constexpr const char* kOp = "turbo_append";
  check_kv(kOp, k, v);
  const int64_t batch = k.size(0), kv_heads = k.size(1), num_new = k.size(2), head_dim = k.size(3);
  std::vector<Slab> slabs;
  const Store store =
      check_store(kOp, {pool, block_table, tail, seq_lens, Access::kWrite, Access::kWrite}, k,
                  batch, kv_heads, head_dim, slabs);
  check_tensor(kOp, "tail_scale", tail_scale, ScalarType::Float, {batch, 2, kv_heads}, k);
  check_tensor(kOp, "clamp_count", clamp_count, ScalarType::Long, {batch, 2, kv_heads}, k);
  const Calibration calibration =
      check_calibration(kOp, k_balance, k_mean, k, batch, kv_heads, head_dim);
  const float margin = check_tail_margin(kOp, tail_margin);
  const HostValues<> padding =
      check_left_padding(kOp, left_padding, k, batch, num_new, check_values);

  const AppendParams params{.k = input_view(kOp, "k", k),
                            .v = input_view(kOp, "v", v),
                            .num_new = num_new,
                            .left_padding = data<int32_t>(left_padding),
                            .calibration = calibration,
                            .store = store,
                            .tail_margin = margin,
                            .tail_scale = mutable_data<float>(tail_scale),
                            .clamp_count = mutable_data<int64_t>(clamp_count)};
  binding::check_disjoint(kOp,
                          {{"pool", pool, "slabs"},
                           {"tail", tail},
                           {"tail_scale", tail_scale},
                           {"clamp_count", clamp_count},
                           {"seq_lens", seq_lens}},
                          {{"block_table", block_table},
                           {"k", k},
                           {"v", v},
                           {"k_balance", k_balance},
                           {"k_mean", k_mean},
                           {"left_padding", left_padding}});
  const HostValues<> lens(seq_lens, check_values), table(block_table, check_values);
  if (lens.readable()) check_append_values(kOp, params, lens, table, padding);
  backend::append(params);
}

void turbo_rewind(const std::vector<Tensor>& pool, const Tensor& block_table, const Tensor& tail,
                  const Tensor& seq_lens, const Tensor& new_lens, bool check_values) {
  constexpr const char* kOp = "turbo_rewind";
  const int64_t head_dim = check_store_head_dim(kOp, block_table, tail);
  const int64_t batch = block_table.size(0), kv_heads = block_table.size(2);
  std::vector<Slab> slabs;
  const Store store =
      check_store(kOp, {pool, block_table, tail, seq_lens, Access::kRead, Access::kWrite}, tail,
                  batch, kv_heads, head_dim, slabs);
  check_tensor(kOp, "new_lens", new_lens, ScalarType::Int, {batch}, tail);

  binding::check_disjoint(
      kOp, {{"tail", tail}, {"seq_lens", seq_lens}},
      {{"pool", pool, "slabs"}, {"block_table", block_table}, {"new_lens", new_lens}});
  const HostValues<> lens(seq_lens, check_values), table(block_table, check_values),
      targets(new_lens, check_values);
  if (lens.readable()) {
    check_seq_lens(kOp, lens, store);
    for (int64_t b = 0; b < batch; ++b) {
      KV_CHECK(targets[b] >= 0 && targets[b] <= lens[b], kOp, element_name("new_lens", {b}),
               "in [0, " + std::to_string(lens[b]) + "]", targets[b]);
      const int64_t page = targets[b] / kPageTokens;
      // Only a page that was full can have to be read back.
      if (targets[b] % kPageTokens != 0 && page < lens[b] / kPageTokens) {
        check_entries(kOp, table, store, b, page, page + 1);
      }
    }
  }
  backend::rewind({.store = store, .new_lens = data<int32_t>(new_lens)});
}

std::tuple<Tensor, Tensor> turbo_dequantize(const std::vector<Tensor>& pool,
                                            const Tensor& block_table, const Tensor& tail,
                                            const Tensor& seq_lens,
                                            const std::optional<Tensor>& k_balance,
                                            const std::optional<Tensor>& k_mean, int64_t kv_len,
                                            bool right_align, ScalarType dtype, bool check_values) {
  constexpr const char* kOp = "turbo_dequantize";
  const int64_t head_dim = check_store_head_dim(kOp, block_table, tail);
  const int64_t batch = block_table.size(0), kv_heads = block_table.size(2);
  std::vector<Slab> slabs;
  const Store store =
      check_store(kOp, {pool, block_table, tail, seq_lens, Access::kRead, Access::kRead}, tail,
                  batch, kv_heads, head_dim, slabs);
  const Calibration calibration =
      check_calibration(kOp, k_balance, k_mean, tail, batch, kv_heads, head_dim);
  KV_CHECK_RANGE(kOp, kv_len, int64_t{0}, kMaxTokens);
  binding::dtype_of(kOp, "dtype", dtype);

  const HostValues<> lens(seq_lens, check_values), table(block_table, check_values);
  if (lens.readable()) {
    check_seq_lens(kOp, lens, store);
    for (int64_t b = 0; b < batch; ++b) {
      KV_CHECK(kv_len >= lens[b], kOp, "kv_len",
               "at least " + element_name("seq_lens", {b}) + " = " + std::to_string(lens[b]),
               kv_len);
      check_entries(kOp, table, store, b, 0, lens[b] / kPageTokens);
    }
  }
  Tensor k = new_output(kOp, "k", tail, {batch, kv_heads, kv_len, head_dim}, dtype);
  Tensor v = new_output(kOp, "v", tail, {batch, kv_heads, kv_len, head_dim}, dtype);
  backend::dequantize({.store = store,
                       .calibration = calibration,
                       .kv_len = kv_len,
                       .right_align = right_align,
                       .k = output_view(kOp, "k", k),
                       .v = output_view(kOp, "v", v)});
  return {k, v};
}

}  // namespace kvcore::turbo
