#include "core/dispatch.h"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo::backend {

void append(const AppendParams& p) {
  if (p.store.batch == 0) return;
  dispatch_dtype(p.k.dtype, [&](auto t) { launch_append<typename decltype(t)::type>(p); });
}

}  // namespace kvcore::turbo::backend
