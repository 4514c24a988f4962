// turbo_decode on CUDA: the parts of the context, then their merge.
#include <optional>

#include "core/cuda/error_flags.cuh"
#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "turbo/cuda/decode_args.cuh"
#include "turbo/cuda/decode_launch.h"
#include "turbo/cuda/decode_merge_kernel.cuh"
#include "turbo/cuda/decode_units.cuh"
#include "turbo/cuda/softmax.cuh"

namespace kvcore::turbo {
namespace {

constexpr int kResolveThreads = 256;

/// The block of every entry of the table, for pools of more slabs than fit the arguments of a
/// kernel that is launched at every step.
__global__ void resolve_blocks_kernel(const __grid_constant__ DeviceStore<kMaxSlabs> store,
                                      int64_t num_rows, BlockRef* refs) {
  const int64_t at = int64_t{blockIdx.x} * kResolveThreads + threadIdx.x;
  if (at >= num_rows * store.max_pages) return;
  const PoolBlock block = pool_block(store, at / store.max_pages, at % store.max_pages);
  refs[at] = block_ref(block.data, block.bits);
}

}  // namespace

namespace backend {

void decode(const DecodeParams& p) {
  const Store& store = p.store;
  const DecodePlan plan = decode_plan(p);
  const int64_t num_units = store.batch * store.kv_heads;
  const unsigned num_blocks = grid_of(num_units * plan.num_splits * plan.num_tiles);

  const bool is_split = plan.num_splits > 1;
  const int64_t num_partials = is_split ? num_units * plan.num_splits * plan.num_rows : 0;
  const Scratch partial_o(byte_count({num_partials, store.head_dim, sizeof(float)}));
  const Scratch partials(byte_count({num_partials, sizeof(DecodePartial)}));
  std::optional<Scratch> refs;

  Store first_slabs = store;
  first_slabs.num_slabs = std::min<int64_t>(store.num_slabs, kFewSlabs);
  DecodeArgs args = {.p = p,
                     .store = device_store<kFewSlabs>(first_slabs),
                     .refs = nullptr,
                     .plan = plan,
                     .partials = reinterpret_cast<DecodePartial*>(partials.data()),
                     .partial_o = reinterpret_cast<float*>(partial_o.data()),
                     .threshold = score_threshold(p.softmax),
                     .error_flags = error_flags()};
  if (store.num_slabs > kFewSlabs) {
    const int64_t num_rows = num_units * 2, entries = num_rows * store.max_pages;
    refs.emplace(byte_count({entries, sizeof(BlockRef)}));
    auto* const blocks = reinterpret_cast<BlockRef*>(refs->data());
    if (entries > 0) {
      launch(resolve_blocks_kernel, dim3(grid_of(ceil_div(entries, kResolveThreads))),
             dim3(kResolveThreads), 0, current_stream(), device_store<kMaxSlabs>(store), num_rows,
             blocks);
    }
    args.refs = blocks;
  }

  dispatch<64, 96, 128, 256>("head_dim", store.head_dim, [&](auto head_dim) {
    constexpr int kMostRows = decode_tile_rows(head_dim(), 16);
    dispatch<8, kMostRows>("tile_rows", plan.tile_rows,
                           [&](auto rows) { launch_decode<head_dim(), rows()>(args, num_blocks); });
    if (is_split) {
      launch(decode_merge_kernel<head_dim()>,
             dim3(grid_of(ceil_div(num_units * plan.num_rows, kMergeRows))),
             dim3(kMergeRows * kWarpSize), 0, current_stream(), args);
    }
  });
}

}  // namespace backend
}  // namespace kvcore::turbo
