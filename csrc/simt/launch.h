// A kernel call as the scheduler runs it.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "simt/scheduler.h"

namespace kvcore::simt {

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
            const std::remove_reference_t<P>&... args) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernels take plain values");
  static_assert((sizeof(P) + ... + size_t{0}) <= 32764, "kernel parameters end at 32,764 bytes");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  };
  const Call call{kernel, {args...}};
  run({.kernel = reinterpret_cast<const void*>(kernel),
       .call =
           [](const void* arguments) {
             const auto& call = *static_cast<const Call*>(arguments);
             // Each thread gets copies, as on the device.
             std::apply(call.kernel, call.args);
           },
       .arguments = &call},
      grid, block, smem_bytes);
}

}  // namespace kvcore::simt
