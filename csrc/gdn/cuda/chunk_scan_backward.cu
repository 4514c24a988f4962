// gdn_chunk_scan_backward on CUDA: window by window from the end of the tokens, states forward,
// their gradients back, and then everything else for all chunks at once.
#include <algorithm>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "gdn/cuda/backward_launch.h"
#include "gdn/cuda/backward_prepare_kernel.cuh"
#include "gdn/cuda/invalid_kernel.cuh"
#include "gdn/cuda/pack.h"

namespace kvcore::gdn {
namespace backward {
namespace {

/// Scratch memory of so many floats.
class Floats {
 public:
  explicit Floats(std::initializer_list<int64_t> shape)
      : memory_(byte_count({byte_count(shape), sizeof(float)})) {}
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }

 private:
  Scratch memory_;
};

/// An input as [batch, num_tokens, heads, dim] in fp32, times a factor for each row.
class Fp32Copy : public Floats {
 public:
  Fp32Copy(const InputView& x, const float* factor, const Sizes& s, int64_t heads, int64_t dim)
      : Floats({s.batch, s.num_tokens, heads, dim}) {
    pack(x, factor, s, heads, dim, data());
  }
};

template <int kParts, int kMaxDim>
void run(BackwardArgs& args, int64_t window_slots) {
  // States of more than 128 keys fill the registers, and spill with one part.
  constexpr int kStateParts = kMaxDim > 128 ? 2 : kParts;
  const int64_t num_windows = std::max<int64_t>(ceil_div(args.num_slots, window_slots), 1);
  const auto enter = [&](int64_t window) {
    args.window = window;
    args.begin = window * window_slots;
    args.end = std::min(args.begin + window_slots, args.num_slots);
    if (args.begin < args.end) launch_prepare<kParts>(args);
  };
  for (int64_t window = 0; window + 1 < num_windows; ++window) {
    enter(window);
    launch_states<kStateParts, kMaxDim>(args, false);
  }
  for (int64_t window = num_windows - 1; window >= 0; --window) {
    enter(window);
    std::swap(args.d_boundaries[0], args.d_boundaries[1]);
    if (args.table.sequences.num_seqs > 0) {
      launch_states<kStateParts, kMaxDim>(args, true);
      launch_d_states<kStateParts, kMaxDim>(args);
    }
    if (args.begin < args.end) launch_gradients<kParts>(args);
  }
}

}  // namespace
}  // namespace backward

namespace backend {

void chunk_scan_backward(const ChunkScanBackwardParams& p) {
  using backward::Floats;
  using backward::Fp32Copy;
  using backward::TokenScalars;
  const Sizes& s = p.sizes;
  backward::BackwardArgs args = {};
  args.p = p;
  args.gate = device_gate(p.gate);
  args.table = sequence_table(p.sequences, s.num_tokens);
  args.group = static_cast<int>(s.v_heads / s.k_heads);
  args.num_slots = num_chunk_slots(args.table);
  const int64_t size = s.k_dim * s.v_dim, tokens = s.batch * s.num_tokens;
  const int64_t slot_bytes =
      s.v_heads * (4 * (2 * size + 4 * kChunk * s.v_dim + 2 * kChunk * kChunk) +
                   static_cast<int64_t>(sizeof(TokenScalars))) +
      s.k_heads * 8 * kChunk * s.k_dim;
  const int64_t window =
      backward_window(args.num_slots, slot_bytes, s.k_heads, device_properties().sm_count);
  const int64_t num_windows = ceil_div(args.num_slots, window);

  const bool normed = p.qk_l2norm;
  const Fp32Copy q(p.q, normed ? p.rstd : nullptr, s, s.k_heads, s.k_dim);
  const Fp32Copy k(p.k, normed ? p.rstd + tokens * s.k_heads : nullptr, s, s.k_heads, s.k_dim);
  const Fp32Copy v(p.v, nullptr, s, s.v_heads, s.v_dim);
  const Fp32Copy d_out(p.d_out, nullptr, s, s.v_heads, s.v_dim);
  const Floats a({window, s.v_heads, kChunk * kChunk}),
      scores({window, s.v_heads, kChunk * kChunk});
  const Scratch scalars(byte_count({window, s.v_heads, sizeof(TokenScalars)}));
  const Floats state({window, s.v_heads, size}), d_state({window, s.v_heads, size});
  const Floats rows({4, window, s.v_heads, kChunk * s.v_dim});
  const Floats dqk({window, s.k_heads, 2, kChunk * s.k_dim});
  const Floats boundaries({std::max<int64_t>(num_windows - 1, 0) + 1, s.v_heads, size});
  const Floats d_boundaries({2, s.v_heads, size});
  const Floats gates({2, args.num_slots, s.v_heads});
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.d_out = d_out.data();
  args.a = a.data();
  args.p_scores = scores.data();
  args.tokens = reinterpret_cast<TokenScalars*>(scalars.data());
  args.state = state.data();
  args.d_state = d_state.data();
  const int64_t row_floats = window * s.v_heads * kChunk * s.v_dim;
  args.w = rows.data();
  args.u = args.w + row_floats;
  args.du = args.u + row_floats;
  args.dw = args.du + row_floats;
  args.dqk = dqk.data();
  args.boundaries = boundaries.data();
  args.d_boundaries[0] = d_boundaries.data();
  args.d_boundaries[1] = args.d_boundaries[0] + s.v_heads * size;
  args.gates = gates.data();

  const SequenceCheck check(args.table);
  dispatch_bool(p.q.dtype == Dtype::kBFloat16, [&](auto is_bf16) {
    dispatch_bool(s.k_dim <= 128, [&](auto is_small) {
      backward::run<is_bf16() ? 1 : 2, is_small() ? 128 : kMaxHeadDim>(args, window);
    });
  });
  launch(backward::gate_sums_kernel<kGateSumThreads>, grid_of(ceil_div(s.v_heads, kGateSumThreads)),
         kGateSumThreads, 0, current_stream(), args);
  const int64_t states = p.sequences.num_seqs * s.v_heads * size;
  check.poison({{p.dq.data, p.dq.dtype, tokens * s.k_heads * s.k_dim},
                {p.dk.data, p.dk.dtype, tokens * s.k_heads * s.k_dim},
                {p.dv.data, p.dv.dtype, tokens * s.v_heads * s.v_dim},
                {p.dg.data, p.dg.dtype, tokens * s.v_heads},
                {p.dbeta.data, p.dbeta.dtype, tokens * s.v_heads},
                {p.dA_log, Dtype::kFloat32, p.dA_log != nullptr ? s.v_heads : 0},
                {p.ddt_bias, Dtype::kFloat32, p.ddt_bias != nullptr ? s.v_heads : 0},
                {p.d_initial_state, Dtype::kFloat32, p.d_initial_state != nullptr ? states : 0}});
}

}  // namespace backend
}  // namespace kvcore::gdn
