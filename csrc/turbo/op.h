// The Torch-aware half of the family: the ops as the dispatcher calls them and the checks that they
// share. op_*.cpp are compiled unchanged into every library (kvcore_cpu, kvcore_cuda, kvcore_simt),
// each of which links its own definitions of namespace backend in params.h.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/arguments.h"
#include "binding/check.h"
#include "binding/memory.h"
#include "binding/tensor.h"
#include "turbo/params.h"

namespace kvcore::turbo {

using binding::check_tensor;
using binding::element_name;
using binding::HostValues;
using binding::ScalarType;
using binding::Tensor;

// ---- Ops: names, order and meaning of the arguments are those of the schemas in ops.cpp.

std::tuple<Tensor, Tensor> turbo_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_balance,
    const std::optional<Tensor>& k_mean, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, bool causal, std::optional<double> scale,
    std::optional<int64_t> window, std::optional<double> sas_threshold, bool check_values);

std::tuple<Tensor, Tensor> turbo_calibrate(const Tensor& k,
                                           const std::optional<Tensor>& left_padding, bool balance,
                                           bool subtract_mean, int64_t rotary_dim,
                                           bool check_values);

Tensor turbo_head_priority(const Tensor& x, const std::optional<Tensor>& left_padding,
                           bool check_values);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> turbo_quantize(
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_balance,
    const std::optional<Tensor>& k_mean, const std::optional<Tensor>& left_padding,
    const std::vector<int64_t>& k_bits, const std::vector<int64_t>& v_bits, int64_t sink_pages,
    double tail_margin, bool check_values);

void turbo_append(const Tensor& k, const Tensor& v, const std::vector<Tensor>& pool,
                  const Tensor& block_table, const Tensor& tail, const Tensor& tail_scale,
                  const Tensor& clamp_count, const Tensor& seq_lens,
                  const std::optional<Tensor>& k_balance, const std::optional<Tensor>& k_mean,
                  const std::optional<Tensor>& left_padding, double tail_margin, bool check_values);

void turbo_rewind(const std::vector<Tensor>& pool, const Tensor& block_table, const Tensor& tail,
                  const Tensor& seq_lens, const Tensor& new_lens, bool check_values);

std::tuple<Tensor, Tensor> turbo_dequantize(const std::vector<Tensor>& pool,
                                            const Tensor& block_table, const Tensor& tail,
                                            const Tensor& seq_lens,
                                            const std::optional<Tensor>& k_balance,
                                            const std::optional<Tensor>& k_mean, int64_t kv_len,
                                            bool right_align, ScalarType dtype, bool check_values);

std::tuple<Tensor, Tensor> turbo_decode(const Tensor& q, const std::vector<Tensor>& pool,
                                        const Tensor& block_table, const Tensor& tail,
                                        const Tensor& seq_lens,
                                        const std::optional<Tensor>& k_balance,
                                        const std::optional<Tensor>& k_mean, bool causal,
                                        std::optional<double> scale, std::optional<int64_t> window,
                                        std::optional<double> sas_threshold, bool check_values);

// ---- Checks shared by the ops (op_check.cpp). All throw before anything is written.

/// k and v: two inputs of attention of the same shape, dtype and device.
void check_kv(const char* op, const Tensor& k, const Tensor& v);

/// Shape, dtype, device and contiguity of k_balance and k_mean; `like` gives the device.
Calibration check_calibration(const char* op, const std::optional<Tensor>& k_balance,
                              const std::optional<Tensor>& k_mean, const Tensor& like,
                              int64_t batch, int64_t kv_heads, int64_t head_dim);

/// Shape of an int32 [batch] tensor and, where readable, 0 <= value <= num_tokens. Without a
/// tensor the result is not readable: no padding. `wanted`: see HostValues.
HostValues<> check_left_padding(const char* op, const std::optional<Tensor>& left_padding,
                                const Tensor& like, int64_t batch, int64_t num_tokens, bool wanted);

/// What an op does to the tensors of a store.
enum class Access { kRead, kWrite };

/// The tensors of a store as an op got them.
struct StoreTensors {
  const std::vector<Tensor>& pool;
  const Tensor& block_table;
  const Tensor& tail;
  const Tensor& seq_lens;
  Access pool_access;
  Access tail_access;  // of seq_lens too
};

/// head_dim of a store, from the bytes of its tail slots; checks the dimensions of block_table and
/// tail that check_store takes for granted when no other tensor tells them.
int64_t check_store_head_dim(const char* op, const Tensor& block_table, const Tensor& tail);

/// Shapes, dtypes, device, contiguity and slab widths. `slabs` becomes the storage of
/// Store::slabs and must outlive the result; `like` gives the device.
Store check_store(const char* op, const StoreTensors& tensors, const Tensor& like, int64_t batch,
                  int64_t kv_heads, int64_t head_dim, std::vector<Slab>& slabs);

/// Tokens that fit a sequence of the store: the open tail needs no entry in the block table.
int64_t max_seq_len(const Store& store);

/// 0 <= seq_lens <= max_seq_len.
void check_seq_lens(const char* op, const HostValues<>& seq_lens, const Store& store);

/// Entries of pages [page_begin, page_end) of a sequence, all heads of K and V, name blocks of the
/// pool.
void check_entries(const char* op, const HostValues<>& block_table, const Store& store,
                   int64_t batch_idx, int64_t page_begin, int64_t page_end);

}  // namespace kvcore::turbo
