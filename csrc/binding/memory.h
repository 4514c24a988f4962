// What an op writes may not be what it reads: checked lengths and indices would be others when they
// are used.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "binding/check.h"

namespace kvcore::binding {

/// An argument of an op, for check_disjoint. Refers to the tensors: use it within the call.
struct MemoryOf {
  MemoryOf(const char* name, const Tensor& tensor)
      : argument(name), tensors(&tensor), num_tensors(1) {}
  MemoryOf(const char* name, const std::optional<Tensor>& tensor)
      : argument(name), tensors(tensor ? &*tensor : nullptr), num_tensors(tensor ? 1 : 0) {}
  /// A list of tensors; `kind` is what messages call them.
  MemoryOf(const char* name, const std::vector<Tensor>& list, const char* kind)
      : argument(name), tensors(list.data()), num_tensors(list.size()), list_of(kind) {}

  const char* argument;
  const Tensor* tensors;
  size_t num_tensors;
  const char* list_of = nullptr;
};

/// Nothing that is written overlaps anything else, from its first to its last element, whatever
/// lies between them. Of two that are written, messages name the one that is listed first.
void check_disjoint(const char* op, std::initializer_list<MemoryOf> written,
                    std::initializer_list<MemoryOf> read);

}  // namespace kvcore::binding
