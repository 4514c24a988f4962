// Checks of whole arguments, shared by the families. All throw before anything is written.
#pragma once

#include <initializer_list>
#include <optional>

#include "binding/check.h"
#include "binding/host_values.h"
#include "binding/tensor.h"

namespace kvcore::binding {

/// Shape (kAnySize where any will do), dtype, contiguity, and the device of `like`.
void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like);

/// A float input of attention, [batch, heads, tokens, head_dim], of any strides, head_dim being
/// supported.
void check_input(const char* op, const char* argument, const Tensor& tensor);

/// q has a multiple of kv_heads heads; `argument` is the tensor that kv_heads comes from.
void check_heads(const char* op, const char* argument, const Tensor& q, int64_t kv_heads);

/// Shape of an int32 [batch] tensor and, where readable, 0 <= value <= limit. `wanted`: see
/// HostValues.
HostValues<> check_lens(const char* op, const char* argument, const Tensor& lens,
                        const Tensor& like, int64_t batch, int64_t limit, bool wanted);

/// int32 [num_seqs + 1] and, where readable, from 0 to num_tokens, never falling. Returns num_seqs.
int64_t check_cu_seqlens(const char* op, const char* argument, const Tensor& tensor,
                         const Tensor& like, int64_t num_tokens, bool wanted);

/// The factor of the scores, by default dim^-0.5.
float check_scale(const char* op, std::optional<double> scale, int64_t dim);

/// Keys that a query sees, its own being the last; 0: all.
int64_t check_window(const char* op, std::optional<int64_t> window, bool causal);

}  // namespace kvcore::binding
