// Ops that expose the shared C++ helpers to tests/test_core.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "binding/check.h"
#include "binding/tensor.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"

namespace {

using kvcore::binding::kAnySize;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "core_op";

void check_dtype(const Tensor& x) { KV_CHECK_DTYPE(kOp, x, ScalarType::Float, ScalarType::Half); }
void check_dim(const Tensor& x) { KV_CHECK_DIM(kOp, x, 2); }
void check_shape(const Tensor& x) { KV_CHECK_SHAPE(kOp, x, kAnySize, 64); }
void check_contiguous(const Tensor& x) { KV_CHECK_CONTIGUOUS(kOp, x); }
void check_last_contiguous(const Tensor& x) { KV_CHECK_LAST_CONTIGUOUS(kOp, x); }
void check_same_dtype(const Tensor& x, const std::optional<Tensor>& other) {
  if (other.has_value()) KV_CHECK_SAME_DTYPE(kOp, *other, x);
}
void check_same_device(const Tensor& x, const std::optional<Tensor>& other) {
  if (other.has_value()) KV_CHECK_SAME_DEVICE(kOp, *other, x);
}
void check_one_of(int64_t bits) { KV_CHECK_ONE_OF(kOp, bits, 2, 4, 8); }
void check_range(int64_t page) { KV_CHECK_RANGE(kOp, page, 0, 9); }

int64_t dispatch_value(int64_t head_dim) {
  int64_t chosen = 0;
  kvcore::dispatch<64, 96, 128>("head_dim", head_dim, [&](auto d) { chosen = d(); });
  return chosen;
}

int64_t dispatch_bytes(const Tensor& x) {
  int64_t bytes = 0;
  kvcore::dispatch_dtype(kvcore::binding::dtype_of(kOp, "x", x),
                         [&](auto t) { bytes = sizeof(typename decltype(t)::type); });
  return bytes;
}

// Adds 1 to every counter of the range; throws at element fail_at, if there is one.
void count_range(const Tensor& counts, int64_t grain, int64_t fail_at) {
  auto* data = kvcore::binding::mutable_data<int64_t>(counts);
  kvcore::parallel_for(0, counts.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i == fail_at) throw std::runtime_error("element " + std::to_string(i) + " failed");
      ++data[i];
    }
  });
}

// Row `worker` of counts, int64 [workers, tasks], counts its tasks. A slot that two threads shared
// would lose counts of `busy`, which is not atomic.
void count_tasks(const Tensor& counts, const Tensor& busy, int64_t fail_at) {
  auto* data = kvcore::binding::mutable_data<int64_t>(counts);
  auto* slots = kvcore::binding::mutable_data<int64_t>(busy);
  const int64_t tasks = counts.size(1);
  kvcore::parallel_tasks(tasks, [&](int64_t task, int64_t worker) {
    if (task == fail_at) throw std::runtime_error("task " + std::to_string(task) + " failed");
    ++data[worker * tasks + task];
    for (int i = 0; i < 1000; ++i) {
      volatile int64_t& slot = slots[worker];
      slot = slot + 1;
    }
  });
}

Tensor unwritten(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

int64_t max_workers(int64_t tasks) { return kvcore::max_workers(tasks); }

}  // namespace

STABLE_TORCH_LIBRARY(kvcore_test, m) {
  m.def("check_dtype(Tensor x) -> ()");
  m.def("check_dim(Tensor x) -> ()");
  m.def("check_shape(Tensor x) -> ()");
  m.def("check_contiguous(Tensor x) -> ()");
  m.def("check_last_contiguous(Tensor x) -> ()");
  m.def("check_same_dtype(Tensor x, Tensor? other) -> ()");
  m.def("check_same_device(Tensor x, Tensor? other) -> ()");
  m.def("check_one_of(int bits) -> ()");
  m.def("check_range(int page) -> ()");
  m.def("dispatch_value(int head_dim) -> int");
  m.def("dispatch_bytes(Tensor x) -> int");
  m.def("count_range(Tensor(a!) counts, int grain, int fail_at) -> ()");
  m.def("count_tasks(Tensor(a!) counts, Tensor(b!) busy, int fail_at) -> ()");
  m.def("unwritten(Tensor x) -> Tensor");
  m.def("max_workers(int tasks) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kvcore_test, CompositeExplicitAutograd, m) {
  m.impl("check_dtype", TORCH_BOX(&check_dtype));
  m.impl("check_dim", TORCH_BOX(&check_dim));
  m.impl("check_shape", TORCH_BOX(&check_shape));
  m.impl("check_contiguous", TORCH_BOX(&check_contiguous));
  m.impl("check_last_contiguous", TORCH_BOX(&check_last_contiguous));
  m.impl("check_same_dtype", TORCH_BOX(&check_same_dtype));
  m.impl("check_same_device", TORCH_BOX(&check_same_device));
  m.impl("check_one_of", TORCH_BOX(&check_one_of));
  m.impl("check_range", TORCH_BOX(&check_range));
  m.impl("dispatch_value", TORCH_BOX(&dispatch_value));
  m.impl("dispatch_bytes", TORCH_BOX(&dispatch_bytes));
  m.impl("count_range", TORCH_BOX(&count_range));
  m.impl("count_tasks", TORCH_BOX(&count_tasks));
  m.impl("unwritten", TORCH_BOX(&unwritten));
  m.impl("max_workers", TORCH_BOX(&max_workers));
}
