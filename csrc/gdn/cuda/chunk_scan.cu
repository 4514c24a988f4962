// gdn_chunk_scan on CUDA: what does not need the state for all chunks at once, then each sequence
// from chunk to chunk.
#include <optional>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "gdn/cuda/chunk_scan_args.cuh"
#include "gdn/cuda/chunk_scan_launch.h"
#include "gdn/cuda/invalid_kernel.cuh"
#include "gdn/cuda/operands.cuh"
#include "gdn/cuda/pack.h"

namespace kvcore::gdn {
namespace {

bool has_aligned_units(const InputView& x, Dtype dtype) {
  const int64_t elements = kUnitBytes / (dtype == Dtype::kFloat32 ? 4 : 2);
  return x.dtype == dtype && x.channel_stride == 1 &&
         reinterpret_cast<uintptr_t>(x.data) % kUnitBytes == 0 && x.batch_stride % elements == 0 &&
         x.head_stride % elements == 0 && x.token_stride % elements == 0;
}

/// An input as the kernels read it, in memory of its own where it must be.
template <class T>
class AlignedInput {
 public:
  AlignedInput(const InputView& x, const Sizes& s, int64_t heads, int64_t num_channels) : view_(x) {
    const int64_t count = byte_count({s.batch, s.num_tokens, heads, num_channels});
    if (count == 0 || has_aligned_units(x, DtypeOf<T>::value)) return;
    memory_.emplace(byte_count({count, sizeof(T)}));
    T* const to = reinterpret_cast<T*>(memory_->data());
    pack(x, nullptr, s, heads, num_channels, to);
    view_ = {.data = to,
             .dtype = DtypeOf<T>::value,
             .batch_stride = s.num_tokens * heads * num_channels,
             .head_stride = num_channels,
             .token_stride = heads * num_channels,
             .channel_stride = 1};
  }

  const InputView& view() const { return view_; }

 private:
  InputView view_;
  std::optional<Scratch> memory_;
};

template <class Operand>
void scan(ScanArgs& args) {
  using T = typename Operand::Element;
  const Sizes& s = args.p.sizes;
  const AlignedInput<T> q(args.p.q, s, s.k_heads, s.k_dim), k(args.p.k, s, s.k_heads, s.k_dim);
  const AlignedInput<T> v(args.p.v, s, s.v_heads, s.v_dim);
  args.q = q.view();
  args.k = k.view();
  args.v = v.view();
  if (args.num_slots > 0) launch_chunk_solve<Operand>(args);
  if (args.table.sequences.num_seqs == 0) return;
  dispatch_bool(s.k_dim <= 128, [&](auto is_small) {
    launch_chunk_state<Operand, is_small() ? 128 : kMaxHeadDim>(args);
  });
}

}  // namespace

namespace backend {

void chunk_scan(const ChunkScanParams& p) {
  const Sizes& s = p.sizes;
  ScanArgs args = {};
  args.p = p;
  args.gate = device_gate(p.gate);
  args.table = sequence_table(p.sequences, s.num_tokens);
  args.num_slots = num_chunk_slots(args.table);
  const Scratch records(byte_count({args.num_slots, s.v_heads, sizeof(ChunkRecord)}));
  args.records = reinterpret_cast<ChunkRecord*>(records.data());
  const SequenceCheck check(args.table);
  if (p.q.dtype == Dtype::kBFloat16) {
    scan<Bf16Operand>(args);
  } else {
    scan<Fp32Operand>(args);
  }
  const int64_t tokens = s.batch * s.num_tokens, save = p.save_residuals ? 1 : 0;
  check.poison(
      {{p.out.data, p.out.dtype, tokens * s.v_heads * s.v_dim},
       {p.final_state, Dtype::kFloat32, p.sequences.num_seqs * s.v_heads * s.k_dim * s.v_dim},
       {p.g_cumsum, Dtype::kFloat32, save * tokens * s.v_heads},
       {p.x_inverse, Dtype::kFloat32, save * tokens * s.v_heads * kChunk},
       {p.rstd, Dtype::kFloat32, p.qk_l2norm ? save * 2 * tokens * s.k_heads : 0}});
}

}  // namespace backend
}  // namespace kvcore::gdn
