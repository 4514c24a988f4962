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
#include "lexico/params.h"

namespace kvcore::lexico {

using binding::check_input;
using binding::check_tensor;
using binding::element_name;
using binding::HostValues;
using binding::ScalarType;
using binding::Tensor;

// ---- Ops: names, order and meaning of the arguments are those of the schemas in ops.cpp.

std::tuple<Tensor, Tensor, Tensor, Tensor> lexico_encode(const Tensor& x, const Tensor& dictionary,
                                                         const std::optional<Tensor>& gram,
                                                         int64_t sparsity, double tolerance,
                                                         ScalarType dtype, bool check_values);

Tensor lexico_reconstruct(const Tensor& indices, const Tensor& coefficients, const Tensor& scale,
                          const Tensor& dictionary, ScalarType dtype, bool check_values);

void lexico_append(const Tensor& k_indices, const Tensor& k_coefficients, const Tensor& k_scale,
                   const Tensor& v_indices, const Tensor& v_coefficients, const Tensor& v_scale,
                   const Tensor& k_tail, const Tensor& v_tail, const Tensor& tail_lens,
                   bool check_values);

std::tuple<Tensor, Tensor> lexico_seal(const Tensor& k_tail, const Tensor& v_tail, int64_t v_atoms);

std::tuple<Tensor, Tensor> lexico_unseal(const Tensor& k_block, const Tensor& v_block,
                                         int64_t k_sparsity, int64_t v_sparsity, int64_t v_atoms);

std::tuple<Tensor, Tensor, Tensor> lexico_unpack(const Tensor& tail, int64_t kv_len);

std::tuple<Tensor, Tensor> lexico_attention(
    const Tensor& q, const std::vector<Tensor>& k_blocks, const std::vector<Tensor>& v_blocks,
    const Tensor& k_tail, const Tensor& v_tail, const Tensor& tail_lens, const Tensor& k_dictionary,
    const Tensor& v_dictionary, const std::optional<Tensor>& k_buffer,
    const std::optional<Tensor>& v_buffer, const std::optional<Tensor>& buffer_lens,
    const std::optional<Tensor>& left_padding, bool causal, std::optional<double> scale,
    std::optional<int64_t> window, bool check_values);

// ---- Checks shared by the ops (op_check.cpp). All throw before anything is written.

/// fp32 [atoms, head_dim]; returns its atoms.
int64_t check_dictionary(const char* op, const char* argument, const Tensor& dictionary,
                         int64_t head_dim, const Tensor& like);

/// Codes of one kind of vector: int16 indices [batch, heads, tokens, sparsity], coefficients of the
/// same shape and a type that is stored, fp16 scale [batch, heads, tokens].
CoefficientType check_codes(const char* op, const char* indices_name, const Tensor& indices,
                            const char* coefficients_name, const Tensor& coefficients,
                            const char* scale_name, const Tensor& scale);

/// Every index names an atom.
void check_indices(const char* op, const char* argument, const Tensor& indices, int64_t atoms,
                   bool wanted);

/// uint8 [batch, kv_heads, tiles, bytes] (kAnySize where any will do); returns its sparsity.
int64_t check_tail(const char* op, const char* argument, const Tensor& tail, int64_t batch,
                   int64_t kv_heads, int64_t tiles, const Tensor& like);

/// uint8 [batch, kv_heads, bytes], of at least min_bytes bytes.
Block check_block(const char* op, const std::string& argument, const Tensor& block, int64_t batch,
                  int64_t kv_heads, int64_t min_bytes, const Tensor& like);

}  // namespace kvcore::lexico
