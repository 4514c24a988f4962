// Working memory of the CUDA backends, on the device.
#pragma once

#include <cstdint>

namespace kvcore {

/// Memory for kernels on the current stream of the current device, aligned to 256 bytes. It may be
/// released as soon as they are launched: who gets it next runs behind them. Under a graph capture
/// it is the graph's. Defined in csrc/binding/cuda, and by the shim.
class Scratch {
 public:
  /// Throws if there is not so much memory; 0 bytes are allowed.
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() const { return data_; }

 private:
  void* owner_;
  uint8_t* data_;
};

}  // namespace kvcore
