// From a run-time value to a constant: one fold expression, one message that lists the choices.
// For launchers and op.cpp, not for code that is compiled per ISA (it throws, it uses std::string).
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/types.h"

namespace kvcore {

// Calls f(std::integral_constant<int64_t, V>{}) for the V that equals value:
//   dispatch<64, 96, 128, 256>("head_dim", p.head_dim, [&](auto d) { run<d()>(p); });
// Throws std::runtime_error naming the argument and the accepted values if there is none.
template <int64_t... kValues, class F>
void dispatch(const char* name, int64_t value, F&& f) {
  const bool found =
      ((value == kValues ? (f(std::integral_constant<int64_t, kValues>{}), true) : false) || ...);
  if (!found) {
    std::string accepted;
    ((accepted += (accepted.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    throw std::runtime_error(std::string(name) + " must be one of " + accepted + ", got " +
                             std::to_string(value));
  }
}

// Calls f(std::true_type{}) or f(std::false_type{}).
template <class F>
void dispatch_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the T of that dtype; the body uses typename decltype(t)::type:
//   dispatch_dtype(p.q.dtype, [&](auto t) { run<typename decltype(t)::type>(p); });
// Total: op.cpp lets no other dtype through.
template <class F>
void dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(TypeTag<float>{});
    case Dtype::kFloat16:
      return f(TypeTag<Half>{});
    case Dtype::kBFloat16:
      return f(TypeTag<BFloat16>{});
  }
}

}  // namespace kvcore
