// lexico_attention on CUDA: tables of the queries' products with K's atoms, the pass over K, the
// pass over V, the product with V's atoms. Five launches; each one's results are scratch memory of
// the next.
#include <algorithm>

#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "lexico/cuda/attention_launch.h"
#include "lexico/cuda/output_kernel.cuh"
#include "lexico/cuda/tables_kernel.cuh"

namespace kvcore::lexico {
namespace {

/// Places in one allocation: counts bytes first, then hands out pointers in the same order.
class Places {
 public:
  explicit Places(uint8_t* base) : base_(base) {}

  void take(float*& pointer, std::initializer_list<int64_t> shape) {
    const int64_t bytes = byte_count(shape) * static_cast<int64_t>(sizeof(float));
    pointer = base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_ + bytes_);
    bytes_ += ceil_div(bytes, kAlignment) * kAlignment;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;

  uint8_t* base_;
  int64_t bytes_ = 0;
};

int64_t place_arrays(AttentionArgs& args, int64_t num_units, uint8_t* base) {
  const AttentionParams& p = args.p;
  const AttentionPlan& plan = args.plan;
  const int64_t rows = kUnitRows;
  Places places(base);
  places.take(args.tables, {num_units, p.k_atoms, rows});
  places.take(args.queries, {num_units, rows, p.head_dim});
  places.take(args.factors, {num_units, rows});
  places.take(args.scores, {num_units, plan.num_slots, rows});
  places.take(args.chunk_max, {num_units, plan.num_chunks, rows});
  places.take(args.sums, {num_units, plan.segments.all(), rows});
  places.take(args.weights, {num_units, plan.segments.coded(), p.v_atoms, rows});
  places.take(args.values, {num_units, plan.segments.buffer, rows, p.head_dim});
  places.take(args.products, {plan.atom_chunks, num_units, rows, p.head_dim});
  return places.bytes();
}

/// Calls f(blocks, is_last) for groups of blocks that one launch takes; at least once.
template <class F>
void each_launch(const Block* blocks, int64_t num_blocks, F&& f) {
  int64_t first = 0;
  do {
    LaunchBlocks group = {};
    group.first = first;
    group.count = std::min<int64_t>(num_blocks - first, kLaunchBlocks);
    std::copy_n(blocks + first, group.count, group.block);
    first += group.count;
    f(group, first == num_blocks);
  } while (first < num_blocks);
}

void check_alignment(const AttentionParams& p) {
  check_aligned_16(p.k_tail, "lexico_attention: k_tail");
  check_aligned_16(p.v_tail, "lexico_attention: v_tail");
  for (int64_t i = 0; i < p.num_blocks; ++i) {
    const std::string place = std::string("[").append(std::to_string(i)).append("]");
    check_aligned_16(p.k_blocks[i].data, "lexico_attention: k_blocks" + place);
    check_aligned_16(p.v_blocks[i].data, "lexico_attention: v_blocks" + place);
  }
}

}  // namespace

namespace backend {

void attention(const AttentionParams& p) {
  check_alignment(p);
  AttentionArgs args = {};
  args.p = p;
  args.plan = attention_plan(p, device_properties().sm_count);
  args.error_flags = error_flags();
  const int64_t wave =
      std::clamp<int64_t>(kWaveBytes / place_arrays(args, 1, nullptr), 1, args.plan.num_units);
  const Scratch scratch(place_arrays(args, wave, nullptr));
  for (int64_t first = 0; first < args.plan.num_units; first += wave) {
    args.first_unit = first;
    args.num_units = std::min(wave, args.plan.num_units - first);
    place_arrays(args, args.num_units, scratch.data());
    const cudaStream_t stream = current_stream();
    const int64_t rows = args.num_units * kUnitRows, row_tiles = ceil_div(rows, kProductRows);
    const int64_t k_chunks = ceil_div(p.k_atoms, kProductAtoms);
    launch(tables_kernel, grid_of(k_chunks * row_tiles), kTablesThreads, sizeof(TablesSmem), stream,
           args, static_cast<int>(k_chunks));
    each_launch(p.k_blocks, p.num_blocks, [&](const LaunchBlocks& blocks, bool is_last) {
      launch_scores(args, blocks, is_last);
    });
    each_launch(p.v_blocks, p.num_blocks, [&](const LaunchBlocks& blocks, bool is_last) {
      const bool exact = p.q.dtype == Dtype::kFloat32;
      (exact ? launch_values<float> : launch_values<Half>)(args, blocks, is_last);
    });
    launch(product_kernel, grid_of(args.plan.atom_chunks * row_tiles), kProductThreads,
           sizeof(ProductSmem), stream, args);
    launch(finish_kernel, grid_of(ceil_div(rows, kFinishRows)), kFinishRows * kWarpSize, 0, stream,
           args);
  }
}

}  // namespace backend
}  // namespace kvcore::lexico
