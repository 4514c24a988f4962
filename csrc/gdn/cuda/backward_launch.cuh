// Instantiated explicitly in instances/, once in each file.
#pragma once

#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "gdn/cuda/backward_gradient_kernel.cuh"
#include "gdn/cuda/backward_launch.h"
#include "gdn/cuda/backward_prepare_kernel.cuh"
#include "gdn/cuda/backward_state_kernel.cuh"

namespace kvcore::gdn::backward {

template <int kParts>
void launch_prepare(const BackwardArgs& args) {
  launch(prepare_kernel<kParts>, grid_of(byte_count({args.end - args.begin, args.p.sizes.v_heads})),
         kBackwardThreads, kPrepareSmemBytes, current_stream(), args);
}

inline unsigned state_grid(const BackwardArgs& args) {
  return head_slice_grid<kChunk>(args.table, args.p.sizes);
}

template <int kParts, int kMaxDim>
void launch_states(const BackwardArgs& args, bool keep) {
  launch(states_kernel<kParts, kMaxDim>, state_grid(args), kBackwardThreads, sizeof(StateSmem),
         current_stream(), args, keep);
}

template <int kParts, int kMaxDim>
void launch_d_states(const BackwardArgs& args) {
  launch(d_states_kernel<kParts, kMaxDim>, state_grid(args), kBackwardThreads, sizeof(StateSmem),
         current_stream(), args);
}

template <int kParts>
void launch_gradients(const BackwardArgs& args) {
  launch(gradients_kernel<kParts>,
         grid_of(byte_count({args.end - args.begin, args.p.sizes.k_heads})), kBackwardThreads,
         sizeof(GradientSmem), current_stream(), args);
}

}  // namespace kvcore::gdn::backward
