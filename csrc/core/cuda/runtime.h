// What launchers need of the library they are in: a stream, device memory, and words that kernels
// write when values on the device are out of range. Defined by binding/cuda for CUDA and by the
// shim for SIMT; free of Torch and of CUDA's device language.
#pragma once

#include <cstdint>

namespace kvcore {

/// The stream that the op runs on, a cudaStream_t: the current one of the current device.
void* current_stream();

/// Device memory for kernels on current_stream(), aligned to 256 bytes. It may be released as soon
/// as they are launched: what gets it next runs behind them.
class Scratch {
 public:
  /// Throws if there is not so much memory. 0 bytes are allowed.
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() const { return data_; }

 private:
  void* owner_;
  uint8_t* data_;
};

/// Kinds of values in device tensors that a kernel may find out of range. It then leaves out what
/// they name, writes NaN, and sets the word of that kind.
enum class DeviceError : int { kSeqLens, kBlockTable, kCuSeqlens, kLeftPadding, kNewLens, kCount };

/// One word per DeviceError, 0 or 1, that the device can write and the host can read at any time;
/// the same for all devices and for the life of the process.
int32_t* device_errors();

}  // namespace kvcore
