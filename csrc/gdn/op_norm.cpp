// RMSNorm (arXiv 1910.07467), with or without a gate: what follows the delta rule, and the other
// norms of its models.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "gdn/op.h"

namespace kvcore::gdn {
namespace {

using binding::format_shape;
using Shape = std::vector<int64_t>;

Shape shape_of(const Tensor& tensor, int64_t dims) {
  Shape shape;
  for (int64_t i = 0; i < dims; ++i) shape.push_back(tensor.size(i));
  return shape;
}

/// Of a shape whose number of dimensions is x's.
void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 const Shape& expected) {
  const bool same = tensor.defined() && shape_of(tensor, tensor.dim()) == expected;
  KV_CHECK(same, op, argument, format_shape(expected), format_shape(tensor));
}

void check_like_x(const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  check_shape(op, argument, tensor, shape_of(x, x.dim()));
  KV_CHECK(tensor.scalar_type() == x.scalar_type(), op, argument,
           binding::format_dtype(x.scalar_type()) + " like x",
           binding::format_dtype(tensor.scalar_type()));
  KV_CHECK(binding::same_device(tensor, x), op, argument,
           "on " + binding::format_device(x) + " like x", binding::format_device(tensor));
}

void check_norm(const char* op, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& gate, double weight_offset) {
  KV_CHECK(x.dim() >= 1, op, "x", "at least 1-dimensional", format_shape(x));
  binding::dtype_of(op, "x", x);
  const int64_t channels = x.size(x.dim() - 1);
  KV_CHECK(channels >= 1 && channels <= kMaxNormChannels, op, "x",
           "of a last dimension of 1 to " + std::to_string(kMaxNormChannels), channels);
  KV_CHECK_SHAPE(op, weight, channels);
  binding::dtype_of(op, "weight", weight);
  KV_CHECK_SAME_DEVICE(op, weight, x);
  if (gate) check_like_x(op, "gate", *gate, x);
  KV_CHECK(std::isfinite(weight_offset), op, "weight_offset", "finite", weight_offset);
}

/// Tensors of one shape as rows: leading dimensions that follow each other in memory are one, and
/// three are left. Where more would be, or where channels are apart, tensors are copied.
class Rows {
 public:
  Rows(std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* tensor : tensors) tensors_.push_back(*tensor);
    const int64_t dims = tensors_[0].dim(), channels = tensors_[0].size(dims - 1);
    for (Tensor& tensor : tensors_) {
      if (channels > 1 && tensor.stride(dims - 1) != 1) tensor = torch::stable::contiguous(tensor);
    }
    if (!merge()) {
      for (Tensor& tensor : tensors_) tensor = torch::stable::contiguous(tensor);
      merge();
    }
  }

  NormSizes sizes() const {
    const Tensor& first = tensors_[0];
    return {.batch = groups_[0].size,
            .heads = groups_[1].size,
            .num_tokens = groups_[2].size,
            .channels = first.size(first.dim() - 1)};
  }
  /// Of the i-th tensor, which must outlive the view: copies are the object's.
  InputView view(const char* op, const char* argument, size_t i) const {
    return {.data = tensors_[i].const_data_ptr(),
            .dtype = binding::dtype_of(op, argument, tensors_[i]),
            .batch_stride = groups_[0].strides[i],
            .head_stride = groups_[1].strides[i],
            .token_stride = groups_[2].strides[i],
            .channel_stride = 1};
  }

 private:
  static constexpr int kGroups = 3;
  struct Group {
    int64_t size = 1;
    Shape strides;  // of each tensor
  };

  /// Whether kGroups were enough.
  bool merge() {
    for (Group& group : groups_) group = {1, Shape(tensors_.size(), 0)};
    int at = kGroups;
    for (int64_t dim = tensors_[0].dim() - 2; dim >= 0; --dim) {
      const int64_t size = tensors_[0].size(dim);
      if (size == 1) continue;
      bool follows = at < kGroups;
      for (size_t i = 0; follows && i < tensors_.size(); ++i) {
        follows = tensors_[i].stride(dim) == groups_[at].strides[i] * groups_[at].size;
      }
      if (follows) {
        groups_[at].size *= size;
        continue;
      }
      if (--at < 0) return false;
      groups_[at].size = size;
      for (size_t i = 0; i < tensors_.size(); ++i) groups_[at].strides[i] = tensors_[i].stride(dim);
    }
    return true;
  }

  std::vector<Tensor> tensors_;
  Group groups_[kGroups];
};

InputView weight_view(const char* op, const Tensor& weight) {
  return {.data = weight.const_data_ptr(),
          .dtype = binding::dtype_of(op, "weight", weight),
          .batch_stride = 0,
          .head_stride = 0,
          .token_stride = 0,
          .channel_stride = weight.stride(0)};
}

Tensor new_like(const char* op, const char* argument, const Tensor& x) {
  return binding::new_output(op, argument, x, x.sizes(), x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> gdn_rms_norm(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& gate, double eps,
                                        double weight_offset) {
  constexpr const char* kOp = "gdn_rms_norm";
  check_norm(kOp, x, weight, gate, weight_offset);
  KV_CHECK(std::isfinite(eps) && eps >= 0, kOp, "eps", "finite and at least 0", eps);
  Tensor out = new_like(kOp, "out", x);
  Tensor rstd = binding::new_output(kOp, "rstd", x, shape_of(x, x.dim() - 1), ScalarType::Float);
  if (out.numel() > 0) {
    const Rows rows = gate ? Rows({&x, &*gate}) : Rows({&x});
    backend::rms_norm({.x = rows.view(kOp, "x", 0),
                       .weight = weight_view(kOp, weight),
                       .gate = gate ? rows.view(kOp, "gate", 1) : InputView{},
                       .sizes = rows.sizes(),
                       .eps = static_cast<float>(eps),
                       .weight_offset = static_cast<float>(weight_offset),
                       .out = binding::output_view(kOp, "out", out),
                       .rstd = binding::mutable_data<float>(rstd)});
  }
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gdn_rms_norm_backward(const Tensor& d_out, const Tensor& x,
                                                         const Tensor& weight, const Tensor& rstd,
                                                         const std::optional<Tensor>& gate,
                                                         double weight_offset) {
  constexpr const char* kOp = "gdn_rms_norm_backward";
  check_norm(kOp, x, weight, gate, weight_offset);
  check_like_x(kOp, "d_out", d_out, x);
  check_shape(kOp, "rstd", rstd, shape_of(x, x.dim() - 1));
  KV_CHECK_DTYPE(kOp, rstd, ScalarType::Float);
  KV_CHECK_SAME_DEVICE(kOp, rstd, x);
  KV_CHECK_CONTIGUOUS(kOp, rstd);
  const int64_t channels = x.size(x.dim() - 1);
  Tensor dx = new_like(kOp, "dx", x);
  Tensor dgate =
      gate ? new_like(kOp, "dgate", x) : binding::new_output(kOp, "dgate", x, {0}, x.scalar_type());
  if (dx.numel() == 0) {
    const Tensor none = binding::new_zero_output(kOp, "dweight", x, {channels}, ScalarType::Float);
    return {dx, none, dgate};
  }
  Tensor dweight = binding::new_output(kOp, "dweight", x, {channels}, ScalarType::Float);
  const Rows rows = gate ? Rows({&x, &d_out, &*gate}) : Rows({&x, &d_out});
  backend::rms_norm_backward(
      {.d_out = rows.view(kOp, "d_out", 1),
       .x = rows.view(kOp, "x", 0),
       .weight = weight_view(kOp, weight),
       .gate = gate ? rows.view(kOp, "gate", 2) : InputView{},
       .rstd = binding::data<float>(rstd),
       .sizes = rows.sizes(),
       .weight_offset = static_cast<float>(weight_offset),
       .dx = binding::output_view(kOp, "dx", dx),
       .dgate = gate ? binding::output_view(kOp, "dgate", dgate) : OutputView{},
       .dweight = binding::mutable_data<float>(dweight)});
  return {dx, dweight, dgate};
}

}  // namespace kvcore::gdn
