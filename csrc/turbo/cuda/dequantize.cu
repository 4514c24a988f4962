#include "core/dispatch.h"
#include "turbo/cuda/store_launch.h"

namespace kvcore::turbo::backend {

void dequantize(const DequantizeParams& p) {
  if (p.store.batch * p.store.kv_heads == 0 || p.kv_len == 0) return;
  dispatch_dtype(p.k.dtype, [&](auto t) { launch_dequantize<typename decltype(t)::type>(p); });
}

}  // namespace kvcore::turbo::backend
