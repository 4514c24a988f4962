#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "turbo/cuda/rewind_kernel.cuh"

namespace kvcore::turbo::backend {

void rewind(const RewindParams& p) {
  const Store& s = p.store;
  if (s.batch == 0) return;
  const int64_t ctas = s.batch * ctas_of_sequence(s.kv_heads);
  Scratch words(byte_count({ctas, sizeof(unsigned long long)}));
  dispatch_slabs(s.num_slabs, [&](auto slabs) {
    const RewindArguments<slabs()> a{
        .new_lens = p.new_lens,
        .arrivals = {reinterpret_cast<unsigned long long*>(words.data()), arrivals_key()},
        .error_flags = error_flags(),
        .store = device_store<slabs()>(s)};
    launch(rewind_kernel<slabs()>, grid_of(ctas), a.store.head_dim + kWarpSize, 0, current_stream(),
           a);
  });
}

}  // namespace kvcore::turbo::backend
