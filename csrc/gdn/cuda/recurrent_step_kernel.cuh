// The recurrent step: every state read once and written once.
//
// grid: one CTA for each (tile of kStepColumns value channels, value head, sequence), tiles
// fastest. A CTA loads its tile of the state into registers, keeps it there for all tokens, and
// writes it where the slots say: after the last token, or with a column for each token after each.
#pragma once

#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "gdn/cuda/gate.cuh"
#include "gdn/cuda/recurrent_step_tile.cuh"
#include "gdn/cuda/slots.cuh"

namespace kvcore::gdn {

struct StepArgs {
  DeviceRows q, k, v;
  DeviceGate gate;
  Sizes sizes;
  float scale;
  bool qk_l2norm;
  float* state;
  SlotTable slots;
  const int32_t* num_accepted;  // may be null
  OutputView out;
  int group;           // v_heads / k_heads
  unsigned num_tiles;  // of v_dim
  uint32_t* error_flags;
};

/// Shared memory: tokens, then the scratch of the tile.
constexpr int kStepScalars = 4;  // decay, beta, q . k, and one for alignment
constexpr int step_token_floats(int k_dim) { return 2 * k_dim + kStepColumns + kStepScalars; }

/// Channels [channel, channel + 4) of the row at an element offset; x stays as it is beyond `dim`.
__device__ inline void load_four(const DeviceRows& rows, int64_t offset, int channel, int dim,
                                 float (&x)[4]) {
  if (channel >= dim) return;
  switch (rows.dtype) {
    case Dtype::kFloat16:
      return load_channels<Half>(rows, offset, channel, x);
    case Dtype::kBFloat16:
      return load_channels<BFloat16>(rows, offset, channel, x);
    default:
      return load_channels<float>(rows, offset, channel, x);
  }
}

/// A warp loads a token: q and k normed, q with the scale. A lane has 4 of every 128 channels.
template <int kParts>
__device__ inline void load_step_token(const StepArgs& a, int batch_idx, int head, int64_t token,
                                       int v_begin, float* to) {
  const int k_dim = static_cast<int>(a.sizes.k_dim), v_dim = static_cast<int>(a.sizes.v_dim);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int k_head = head / a.group;
  const int64_t q_at = a.q.head(batch_idx, k_head) + token * a.q.token_stride;
  const int64_t k_at = a.k.head(batch_idx, k_head) + token * a.k.token_stride;
  float q[kParts][4] = {}, k[kParts][4] = {}, qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    load_four(a.q, q_at, (i * kWarpSize + lane) * 4, k_dim, q[i]);
    load_four(a.k, k_at, (i * kWarpSize + lane) * 4, k_dim, k[i]);
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      qq = __fmaf_rn(q[i][c], q[i][c], qq);
      kk = __fmaf_rn(k[i][c], k[i][c], kk);
      qk = __fmaf_rn(q[i][c], k[i][c], qk);
    }
  }
  float q_factor = a.scale, k_factor = 1.0f;
  if (a.qk_l2norm) {
    q_factor *= 1.0f / sqrtf(warp_sum(qq) + kNormEpsilon);
    k_factor = 1.0f / sqrtf(warp_sum(kk) + kNormEpsilon);
  }
  qk = warp_sum(qk) * q_factor * k_factor;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int channel = (i * kWarpSize + lane) * 4;
    if (channel >= k_dim) break;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      q[i][c] *= q_factor;
      k[i][c] *= k_factor;
    }
    store_floats(to + channel, q[i]);
    store_floats(to + k_dim + channel, k[i]);
  }
  const int64_t v_at = a.v.head(batch_idx, head) + token * a.v.token_stride;
  const bool has_v = v_begin + lane < v_dim;
  to[2 * k_dim + lane] = has_v ? load_channel(a.v, v_at, v_begin + lane) : 0.0f;
  if (lane == 0) {
    float* const scalars = to + 2 * k_dim + kStepColumns;
    scalars[0] = expf(log_decay(a.gate, batch_idx, head, token));
    scalars[1] = write_strength(a.gate, batch_idx, head, token);
    scalars[2] = qk;
  }
}

__device__ inline StepToken step_token(const float* from, int k_dim) {
  const float* const scalars = from + 2 * k_dim + kStepColumns;
  return {.q = from,
          .k = from + k_dim,
          .v = from + 2 * k_dim,
          .decay = scalars[0],
          .beta = scalars[1],
          .qk = scalars[2]};
}

template <template <int> class Tile, int kLoads>
__global__ void __launch_bounds__(kStepThreads, step_ctas(kLoads))
    recurrent_step_kernel(const __grid_constant__ StepArgs a) {
  static_assert(kStepColumns == kWarpSize, "a warp loads a token's value channels");
  const int64_t num_tokens = a.sizes.num_tokens;
  const unsigned v_heads = static_cast<unsigned>(a.sizes.v_heads);
  const int head = static_cast<int>(blockIdx.x / a.num_tiles % v_heads);
  const int batch_idx = static_cast<int>(blockIdx.x / a.num_tiles / v_heads);
  const StepShape shape = {static_cast<int>(a.sizes.k_dim), static_cast<int>(a.sizes.v_dim),
                           static_cast<int>(blockIdx.x % a.num_tiles) * kStepColumns};
  const int64_t state_floats = static_cast<int64_t>(shape.k_dim) * shape.v_dim;
  const auto state_at = [&](int64_t slot) {
    return a.state + (slot * v_heads + head) * state_floats;
  };
  const auto store_out = [&](int64_t token, int column, float value) {
    const int64_t row = (batch_idx * num_tokens + token) * v_heads + head;
    store_element(a.out, row * shape.v_dim + shape.v_begin + column, value);
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  const int64_t start = a.num_accepted != nullptr ? int64_t{a.num_accepted[batch_idx]} - 1 : 0;
  const bool start_fits = start >= 0 && start < a.slots.num_columns;
  const int64_t first_slot = start_fits ? a.slots.slot(batch_idx, start) : -1;
  Tile<kLoads> tile(shape);
  // Loads of the state are on their way while tokens are loaded and slots are checked.
  if (first_slot >= 0 && a.slots.has(first_slot)) tile.load(state_at(first_slot));

  float* const smem = reinterpret_cast<float*>(dynamic_smem());
  const int token_floats = step_token_floats(shape.k_dim);
  const int held = static_cast<int>(num_tokens < kStepTokens ? num_tokens : kStepTokens);
  float* const scratch = smem + held * token_floats;
  const auto load_tokens = [&](int64_t begin) {
    for (int i = warp; i < held && begin + i < num_tokens; i += kStepWarps) {
      load_step_token<kLoads / 8>(a, batch_idx, head, begin + i, shape.v_begin,
                                  smem + i * token_floats);
    }
  };
  if (first_slot >= 0) load_tokens(0);

  const bool is_column_each = a.slots.num_columns > 1;
  bool fits = start_fits;
  if (fits) {
    fits = check_slots(a.slots, batch_idx, start, start + 1) &&
           (!is_column_each || check_slots(a.slots, batch_idx, 0, num_tokens));
  }
  const bool rejected = __syncthreads_or(!fits) != 0;
  if (rejected || first_slot < 0) {
    if (rejected && threadIdx.x == 0) {
      report_error(a.error_flags, start_fits ? kErrorStateIndices : kErrorNumAccepted);
    }
    const float value = rejected ? __int_as_float(0x7fc00000) : 0.0f;
    const int column = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int64_t token = warp; token < num_tokens; token += kStepWarps) {
      if (shape.v_begin + column < shape.v_dim) store_out(token, column, value);
    }
    return;
  }

  for (int64_t token = 0; token < num_tokens; ++token) {
    if (token > 0 && token % kStepTokens == 0) {
      __syncthreads();
      load_tokens(token);
      __syncthreads();
    }
    float out[4];
    tile.step(step_token(smem + static_cast<int>(token % kStepTokens) * token_floats, shape.k_dim),
              scratch, static_cast<int>(token % 2), out);
    tile.for_each_output(out, [&](int column, float value) { store_out(token, column, value); });
    if (!is_column_each) continue;
    const int64_t slot = a.slots.slot(batch_idx, token);
    if (slot >= 0) tile.store(state_at(slot));
  }
  if (!is_column_each) tile.store(state_at(first_slot));
}

}  // namespace kvcore::gdn
