// The Torch-aware half of the family: the ops as the dispatcher calls them.
#pragma once

#include <optional>
#include <tuple>

#include "binding/arguments.h"
#include "binding/check.h"
#include "binding/tensor.h"
#include "dense/params.h"

namespace kvcore::dense {

using binding::ScalarType;
using binding::Tensor;

// Names, order and meaning of the arguments are those of the schemas in ops.cpp.

std::tuple<Tensor, Tensor> dense_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           bool causal, std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor> dense_attention_backward(const Tensor& d_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse,
                                                            const std::optional<Tensor>& d_lse,
                                                            bool causal,
                                                            std::optional<double> scale);

}  // namespace kvcore::dense
