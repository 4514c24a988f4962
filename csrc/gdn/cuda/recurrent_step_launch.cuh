// Instantiated explicitly in instances/, once in each file.
#pragma once

#include <algorithm>

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/recurrent_step_kernel.cuh"
#include "gdn/cuda/recurrent_step_launch.h"

namespace kvcore::gdn {

template <template <int> class Tile, int kLoads>
void launch_recurrent_step_tile(const RecurrentStepParams& p) {
  const Sizes& s = p.sizes;
  const StepArgs args = {
      .q = device_rows(p.q),
      .k = device_rows(p.k),
      .v = device_rows(p.v),
      .gate = device_gate(p.gate),
      .sizes = s,
      .scale = p.scale,
      .qk_l2norm = p.qk_l2norm,
      .state = p.state,
      .slots = {p.state_indices, s.batch, p.num_columns, p.num_slots},
      .num_accepted = p.num_accepted,
      .out = p.out,
      .group = static_cast<int>(s.v_heads / s.k_heads),
      .num_tiles = static_cast<unsigned>(ceil_div(s.v_dim, kStepColumns)),
      .error_flags = error_flags(),
  };
  const int64_t held = std::min<int64_t>(s.num_tokens, kStepTokens);
  const int64_t floats =
      held * step_token_floats(static_cast<int>(s.k_dim)) + Tile<kLoads>::kSmemFloats;
  launch(recurrent_step_kernel<Tile, kLoads>,
         grid_of(byte_count({s.batch, s.v_heads, int64_t{args.num_tiles}})), kStepThreads,
         floats * sizeof(float), current_stream(), args);
}

template <bool kVFirst, int kLoads>
void launch_recurrent_step(const RecurrentStepParams& p) {
  if constexpr (kVFirst) {
    launch_recurrent_step_tile<VFirstTile, kLoads>(p);
  } else {
    launch_recurrent_step_tile<KFirstTile, kLoads>(p);
  }
}

}  // namespace kvcore::gdn
