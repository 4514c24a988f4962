// Runs the threads of a block in turn on one host thread: what the models of CUDA's built-ins in
// this folder are made of.
//
// A thread runs until it waits (a barrier or a warp collective), then the next ready one runs:
// in order, or in an order drawn from KVCORE_SIMT_SEED. Blocks run one after the other, so none
// can wait for another. What is no valid CUDA program fails with the threads and source lines
// concerned: run() throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "simt/types.h"

namespace kvcore::simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

/// A kernel with its arguments.
struct Work {
  const void* kernel;  // address, for its name
  void (*call)(const void* arguments);
  const void* arguments;
};

/// Runs the whole grid. Throws if the launch or the kernel is invalid.
void run(const Work& work, dim3 grid, dim3 block, size_t smem_bytes);

/// The block's dynamic shared memory.
unsigned char* shared_memory();
size_t shared_memory_bytes();

/// Lane of the running thread.
unsigned lane();

/// Stops the kernel: run() throws, naming kernel, block, thread, `where` and the message.
[[noreturn]] void fail(const std::string& message, const std::source_location& where);

/// __syncthreads.
void block_barrier(const std::source_location& where);
/// The same; true if any thread brought true.
bool block_barrier_or(bool predicate, const std::source_location& where);

/// The lanes of a warp meet; the last to come calls `finish` with what each of `lanes` brought
/// (null for the others), and all go on.
struct Collective {
  const char* name;
  void (*finish)(void* const (&brought)[kWarp], unsigned lanes);
  bool aligned;        // every lane of the warp must take part
  bool orders_memory;  // as __syncwarp does and shuffles do not
};
void meet(const Collective& collective, unsigned mask, void* brought,
          const std::source_location& where);

/// An asynchronous copy that the running thread has begun; `land` makes it visible. Copies are
/// kept until a wait for their group.
struct PendingCopy {
  void* smem;
  unsigned char bytes[16];
  int size;
};
void begin_copy(const PendingCopy& copy, const std::source_location& where);
void commit_copies(const std::source_location& where);
/// Calls land for every copy of all groups but the newest `pending`.
void wait_copies(int pending, void (*land)(const PendingCopy& copy));

/// Facts about the modelled device, from KVCORE_SIMT_DEVICE.
struct DeviceModel {
  const char* name;
  int arch;  // 80, 90, 120
  int sm_count;
  int max_smem_bytes;  // per block
};
const DeviceModel& device_model();

}  // namespace kvcore::simt
