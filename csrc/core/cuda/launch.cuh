// Starting kernels, and the few other things that launchers ask of the runtime. Host code: every
// failure is a std::runtime_error that names the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/cuda/device.cuh"
#include "core/cuda/stream.h"

#ifdef __CUDACC__
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#else
#include "simt/launch.h"
#endif

namespace kvcore {

/// The stream to launch on.
inline cudaStream_t current_stream() { return static_cast<cudaStream_t>(current_stream_handle()); }

/// What launch heuristics depend on.
struct DeviceProperties {
  int arch;  // 80, 86, 90, 120, ...
  int sm_count;
  int max_smem_bytes;  // a block may have so much dynamic shared memory
};

#ifdef __CUDACC__
namespace detail {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

inline std::string kernel_name([[maybe_unused]] const void* kernel) {
  const char* symbol = nullptr;
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&symbol, kernel) != cudaSuccess) symbol = nullptr;
#endif
  if (symbol == nullptr) return "a kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string name = status == 0 ? demangled : symbol;
  std::free(demangled);
  return name;
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Beyond 48 KB a kernel must be allowed its shared memory, once on each device.
inline void allow_smem(const void* kernel, size_t smem_bytes) {
  if (smem_bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard lock(mutex);
  size_t& bytes = allowed[{kernel, current_device()}];
  if (smem_bytes <= bytes) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // not to be found again by the next launch
    throw std::runtime_error(kernel_name(kernel) + ": " + std::to_string(smem_bytes) +
                             " bytes of shared memory: CUDA error: " + cudaGetErrorString(error));
  }
  bytes = smem_bytes;
}

}  // namespace detail

/// Of the current device; asked for once.
inline const DeviceProperties& device_properties() {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  const int device = detail::current_device();
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace(device);
  if (is_new) {
    const auto get = [device](cudaDeviceAttr attribute) {
      int value = 0;
      detail::check_cuda(cudaDeviceGetAttribute(&value, attribute, device),
                         "cudaDeviceGetAttribute");
      return value;
    };
    entry->second = {.arch = 10 * get(cudaDevAttrComputeCapabilityMajor) +
                             get(cudaDevAttrComputeCapabilityMinor),
                     .sm_count = get(cudaDevAttrMultiProcessorCount),
                     .max_smem_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }
  return entry->second;
}

/// kernel(args...) on grid x block threads. Asynchronous; no allocation, no synchronisation.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
            const A&... args) {
  const void* address = reinterpret_cast<const void*>(kernel);
  detail::allow_smem(address, smem_bytes);
  kernel<<<grid, block, smem_bytes, stream>>>(args...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(detail::kernel_name(address) +
                             ": launch failed: CUDA error: " + cudaGetErrorString(error));
  }
}

/// Waits for the stream and copies from the device. For the few ops whose outputs have sizes that
/// only the device knows: no graph can capture them, and the error says so.
inline void read_back(void* host, const void* device, size_t bytes, cudaStream_t stream,
                      const char* op) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  detail::check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(std::string(op) +
                             ": cannot be captured in a graph: the sizes of its outputs depend on "
                             "values on the device. Call it between replays");
  }
  detail::check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream),
                     "cudaMemcpyAsync");
  detail::check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

#else

inline const DeviceProperties& device_properties() {
  static thread_local DeviceProperties properties;
  const simt::DeviceModel& model = simt::device_model();
  properties = {model.arch, model.sm_count, model.max_smem_bytes};
  return properties;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t,
            const A&... args) {
  simt::launch(kernel, grid, block, smem_bytes, static_cast<P>(args)...);
}

inline void read_back(void* host, const void* device, size_t bytes, cudaStream_t, const char*) {
  std::memcpy(host, device, bytes);
}

#endif

}  // namespace kvcore
