#include "binding/memory.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvcore::binding {
namespace {

struct Range {
  const char *begin, *end;
  const MemoryOf* owner;
  size_t tensor_idx;
  size_t order;  // in which the ranges were listed, what is written first
  bool written;

  std::string name() const {
    return owner->list_of ? element_name(owner->argument, {static_cast<int64_t>(tensor_idx)})
                          : owner->argument;
  }
};

void add_ranges(std::vector<Range>& ranges, const MemoryOf& owner, bool written) {
  for (size_t i = 0; i < owner.num_tensors; ++i) {
    const Tensor& tensor = owner.tensors[i];
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
    ranges.push_back(
        {begin, begin + (last + 1) * element_bytes, &owner, i, ranges.size(), written});
  }
}

[[noreturn]] void fail(const char* op, const Range* a, const Range* b) {
  if (a->order > b->order) std::swap(a, b);
  if (a->owner == b->owner) {
    fail_check(op, a->owner->argument, std::string(a->owner->list_of) + " that do not overlap",
               a->name() + " and " + b->name() + " in the same memory");
  }
  fail_check(op, a->name(), "in memory of its own", "that of " + b->name());
}

}  // namespace

void check_disjoint(const char* op, std::initializer_list<MemoryOf> written,
                    std::initializer_list<MemoryOf> read) {
  std::vector<Range> ranges;
  for (const MemoryOf& owner : written) add_ranges(ranges, owner, true);
  for (const MemoryOf& owner : read) add_ranges(ranges, owner, false);
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  // Of those that begin earlier, the ones that end last: of all, and of those that are written.
  const Range *farthest = nullptr, *farthest_written = nullptr;
  for (const Range& range : ranges) {
    const Range* other = range.written ? farthest : farthest_written;
    if (other && range.begin < other->end) fail(op, other, &range);
    if (!farthest || range.end > farthest->end) farthest = &range;
    if (range.written && (!farthest_written || range.end > farthest_written->end)) {
      farthest_written = &range;
    }
  }
}

}  // namespace kvcore::binding
