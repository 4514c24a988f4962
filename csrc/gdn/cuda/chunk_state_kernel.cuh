// The second kernel of gdn_chunk_scan: from chunk to chunk through a sequence.
//
// grid: one CTA for each (sequence, value head, slice of kSliceColumns value channels), slices
// fastest; each of its four warps has 16 of them, and a state of its own. The CTA's warps share
// what they read: a chunk is a series of steps, each of which needs two panels (k and q of some
// channels; k again, to write the state) or what lies between (v, A, P). Steps are copied two
// ahead; one barrier for each tells that its copy has arrived and that the slot of the step before
// is free.
#pragma once

#include "gdn/cuda/chunk_state_warp.cuh"
#include "gdn/cuda/head_slices.cuh"

namespace kvcore::gdn {

/// Rows of tokens of a sequence and a head.
template <class T>
struct TokenSource {
  const T* first;
  int64_t stride;

  __device__ Block<T> rows(int64_t token, int num_tokens, int num_channels) const {
    return {first + token * stride, stride, num_tokens, num_channels};
  }
};
/// Where a CTA reads and writes. It is kept in shared memory: registers are scarce.
template <class T>
struct StateTask {
  TokenSource<T> k, q, v;      // v of the CTA's channels
  const ChunkRecord* records;  // of the head, stepping v_heads
  int64_t record_stride;
  int64_t out, out_stride;  // elements of out: of the CTA's channels of the first token
  int64_t state;            // elements of the states
  int64_t length;           // tokens
  int k_dim, num_columns;   // of v, from the CTA's first channel on
};

/// This thread. Made anew in each step, for the sake of registers: what follows from it, dozens of
/// addresses, would else be computed once for all chunks, and kept.
struct ThreadIndex {
  unsigned thread = recompute(threadIdx.x);

  __device__ int lane() const { return static_cast<int>(thread % kWarpSize); }
  /// The warp's first value channel, of the CTA's.
  __device__ int column() const { return static_cast<int>(thread / kWarpSize * kWarpColumns); }
};

template <class Operand>
struct StateSmem {
  using T = typename Operand::Element;
  alignas(1024) uint8_t slots[kStateSlots][2][kPanelBytes];
  SolveTiles<Operand> tiles;
  StateTask<T> task;
};

/// The task of a CTA of the grid.
template <class T>
__device__ inline StateTask<T> state_task(const ScanArgs& args) {
  const Sizes& s = args.p.sizes;
  const auto [seq, head, k_head, column] = head_slice<kSliceColumns>(s);
  const Sequence sequence = sequence_at(args.table, seq);
  const auto source = [&](const InputView& x, int64_t of_head) -> TokenSource<T> {
    return {static_cast<const T*>(x.data) + sequence.batch_idx * x.batch_stride +
                of_head * x.head_stride + sequence.begin * x.token_stride,
            x.token_stride};
  };
  const int64_t out_stride = s.v_heads * s.v_dim;
  TokenSource<T> v = source(args.v, head);
  v.first += column;
  return {.k = source(args.k, k_head),
          .q = source(args.q, k_head),
          .v = v,
          .records = args.records + sequence.first_slot * s.v_heads + head,
          .record_stride = s.v_heads,
          .out = (sequence.batch_idx * s.num_tokens + sequence.begin) * out_stride +
                 head * s.v_dim + column,
          .out_stride = out_stride,
          .state = (seq * s.v_heads + head) * s.k_dim * s.v_dim,
          .length = sequence.length,
          .k_dim = static_cast<int>(s.k_dim),
          .num_columns = static_cast<int>(s.v_dim - column)};
}

/// The copies of a CTA, step by step.
template <class Operand>
class StepQueue {
 public:
  using T = typename Operand::Element;

  /// The task lies there already.
  __device__ explicit StepQueue(StateSmem<Operand>& smem) : smem_(smem) {
    begin_next();
    begin_next();
  }

  /// Of a chunk's keys.
  __device__ int num_panels() const {
    return (smem_.task.k_dim + Operand::kPanelChannels - 1) / Operand::kPanelChannels;
  }

  /// Waits for the next step's tiles; those of the step before may be overwritten.
  __device__ ThreadIndex next() {
    cp_async_wait<1>();
    __syncthreads();
    return begin_next();
  }
  /// The step's panels, if it has any: copies are two slots ahead, and point to the next.
  __device__ const uint8_t* panels() const { return smem_.slots[copy_slot_][0]; }
  /// The place of the panels of a step that has none: free until the next step.
  __device__ uint8_t* spare() { return smem_.slots[copy_slot_][0]; }

 private:
  __device__ ThreadIndex begin_next() {
    const ThreadIndex index;
    const StateTask<T>& task = smem_.task;
    const int64_t done = int64_t{chunk_} * kChunk;
    if (done < task.length) {
      const int num_tokens = static_cast<int>(min(int64_t{kChunk}, task.length - done));
      // Reading: a panel of k and one of q. Then the solve. Writing: two panels of k.
      const int last = num_panels(), write = step_ - last - 1;
      if (write == -1) {
        copy_solve(static_cast<int>(index.thread), task, done, num_tokens);
      } else {
        uint8_t (*const slot)[kPanelBytes] = smem_.slots[copy_slot_];
        const int first = write < 0 ? step_ : 2 * write, second = write < 0 ? first : first + 1;
        const auto copy = [&](uint8_t* panel, const TokenSource<T>& source, int panel_idx) {
          copy_panel<kStateThreads>(static_cast<int>(index.thread), panel,
                                    source.rows(done, num_tokens, task.k_dim),
                                    panel_idx * Operand::kPanelChannels);
        };
        copy(slot[0], task.k, first);
        if (second < last) copy(slot[1], write < 0 ? task.q : task.k, second);
      }
      ++step_;
      if (2 * (write + 1) >= last) {
        step_ = 0;
        ++chunk_;
      }
    }
    copy_slot_ = copy_slot_ + 1 == kStateSlots ? 0 : copy_slot_ + 1;
    cp_async_commit();
    return index;
  }

  __device__ void copy_solve(int thread, const StateTask<T>& task, int64_t done,
                             int num_tokens) const {
    SolveTiles<Operand>& tiles = smem_.tiles;
#pragma unroll
    for (int i = 0; i < SolveTiles<Operand>::kValuePanels; ++i) {
      copy_panel<kStateThreads>(thread, tiles.values[i],
                                task.v.rows(done, num_tokens, task.num_columns),
                                i * Operand::kPanelChannels);
    }
    const auto* const from =
        reinterpret_cast<const uint8_t*>(task.records + int64_t{chunk_} * task.record_stride);
    auto* const to = reinterpret_cast<uint8_t*>(&tiles.record);
    constexpr int kTriangleUnits = 2 * kTriangleRows * kRowUnits;
    static_assert(kTriangleUnits % kStateThreads == 0 && kTriangleRows % 8 == 0);
#pragma unroll
    for (int i = 0; i < kTriangleUnits; i += kStateThreads) {
      const int unit = i + thread;
      cp_async_16(to + panel_offset(unit / kRowUnits, unit % kRowUnits * kUnitBytes),
                  from + unit * kUnitBytes);
    }
    constexpr int kOtherUnits = static_cast<int>(sizeof(ChunkRecord)) / kUnitBytes - kTriangleUnits;
    static_assert(kOtherUnits <= kStateThreads);
    if (thread < kOtherUnits) {
      const int unit = kTriangleUnits + thread;
      cp_async_16(to + unit * kUnitBytes, from + unit * kUnitBytes);
    }
  }

  StateSmem<Operand>& smem_;
  int chunk_ = 0;  // of the step that is copied next
  int step_ = 0;
  int copy_slot_ = 0;
};

template <class Operand, int kMaxDim>
__global__ void __launch_bounds__(kStateThreads)
    chunk_state_kernel(const __grid_constant__ ScanArgs args) {
  static_assert(sizeof(StateSmem<Operand>) <= kPortableSmemBytes);
  static_assert(kTokenTiles * kStateThreads * sizeof(float4) <=
                sizeof(StateSmem<Operand>::slots[0]));
  constexpr int kPanels = kMaxDim / Operand::kPanelChannels;
  if (!args.table.valid()) return;
  const ChunkScanParams& p = args.p;
  auto& smem = *reinterpret_cast<StateSmem<Operand>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    smem.task = state_task<typename Operand::Element>(args);
    smem.tiles.one = 1.0f;
  }
  __syncthreads();
  const auto& task = smem.task;
  const int k_dim = static_cast<int>(p.sizes.k_dim), v_dim = static_cast<int>(p.sizes.v_dim);
  const ThreadIndex first;
  const bool has_columns = first.column() < task.num_columns;

  StateWarp<Operand, kMaxDim> state;
  if (has_columns) {
    state.load_state(first.lane(),
                     p.initial_state == nullptr ? nullptr : p.initial_state + task.state,
                     p.state_v_first, k_dim, v_dim, v_dim - task.num_columns + first.column());
  }
  StepQueue<Operand> steps(smem);
  const int num_panels = steps.num_panels();
  for (int64_t done = 0; done < task.length; done += kChunk) {
    state.begin_chunk();
    // One loop for all steps: the code that begins their copies stands here once, not for each.
#pragma unroll 1
    for (int step = 0; step < num_panels + 1 + (num_panels + 1) / 2; ++step) {
      const ThreadIndex own = steps.next();
      if (!has_columns) continue;
      if (step < num_panels) {
        for_each_constant<kPanels>([&](auto panel) {
          if (panel() != step) return;
          const uint8_t* const k = steps.panels();
          state.template read<panel()>(own.lane(), k, k + kPanelBytes, k_dim);
        });
      } else if (step == num_panels) {
        state.solve(own.lane(), smem.tiles, own.column(),
                    reinterpret_cast<float4*>(steps.spare()) + own.thread);
        state.store_out(own.lane(), smem.tiles, own.column(), p.out,
                        task.out + done * task.out_stride, task.out_stride, task.length - done);
        state.decay_state();
      } else {
        for_each_constant<(kPanels + 1) / 2>([&](auto pair) {
          if (pair() != step - num_panels - 1) return;
          state.template write<2 * pair()>(own.lane(), smem.tiles, steps.panels(), k_dim);
        });
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  if (has_columns) {
    const ThreadIndex last;
    state.store_state(last.lane(), p.final_state + task.state, p.state_v_first, k_dim, v_dim,
                      v_dim - task.num_columns + last.column());
  }
}

}  // namespace kvcore::gdn
