// What is checked and known before a kernel starts.
#pragma once

#include <cstddef>
#include <sstream>
#include <string>

#include "simt/types.h"

namespace kvcore::simt {

constexpr unsigned kMaxThreads = 1024;  // of a block

/// "(x, y, z)" of a dim3 or uint3.
template <class T>
std::string format(const T& v) {
  std::ostringstream out;
  out << '(' << v.x << ", " << v.y << ", " << v.z << ')';
  return out.str();
}

/// Demangled, or "a kernel" for one that is not exported (in an anonymous namespace, say).
std::string kernel_name(const void* kernel);

/// Appends the kernel's offset in its library, in hexadecimal, to the file that
/// KVCORE_SIMT_LAUNCHES names, once in a process: tests/simt/test_launches.py tells which kernels
/// never ran.
void record_launch(const void* kernel);

/// Throws std::runtime_error if CUDA, or the modelled device, has no room for such a launch.
void check_launch(const std::string& kernel, dim3 grid, dim3 block, size_t smem_bytes);

}  // namespace kvcore::simt
