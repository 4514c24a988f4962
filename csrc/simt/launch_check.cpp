#include "simt/launch_check.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <stdexcept>

#include "simt/scheduler.h"

namespace kvcore::simt {

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    return "a kernel";
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

void record_launch(const void* kernel) {
  const char* file = std::getenv("KVCORE_SIMT_LAUNCHES");
  if (file == nullptr || *file == '\0') return;
  static std::set<const void*> recorded;
  Dl_info info;
  if (!recorded.insert(kernel).second || dladdr(kernel, &info) == 0) return;
  std::ostringstream line;
  line << std::hex << static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase)
       << '\n';
  // In one piece: other processes write to the same file.
  std::ofstream out(file, std::ios::app);
  if (!(out << line.str() << std::flush)) {
    throw std::runtime_error(std::string("KVCORE_SIMT_LAUNCHES: cannot write to ") + file);
  }
}

void check_launch(const std::string& kernel, dim3 grid, dim3 block, size_t smem_bytes) {
  const auto reject = [&](const std::string& what, const std::string& limit,
                          const std::string& value) {
    throw std::runtime_error(kernel + ": " + what + " must be " + limit + ", got " + value);
  };
  const bool grid_fits = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 &&
                         grid.z >= 1 && grid.z <= 65535;
  if (!grid_fits) reject("grid", "from 1 to (2147483647, 65535, 65535)", format(grid));
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) {
    reject("block", "1 to 1024 threads, at most 64 in z", format(block));
  }
  const size_t limit = static_cast<size_t>(device_model().max_smem_bytes);
  if (smem_bytes > limit) {
    reject("dynamic shared memory",
           "at most " + std::to_string(limit) + " bytes on " + device_model().name,
           std::to_string(smem_bytes));
  }
}

const DeviceModel& device_model() {
  // The smallest first: it is the default, so what runs there runs everywhere.
  static constexpr DeviceModel kModels[] = {{"sm_120", 120, 170, 99 * 1024},
                                            {"sm_80", 80, 108, 163 * 1024},
                                            {"sm_90", 90, 132, 227 * 1024},
                                            // What depends on the device's size, at its smallest.
                                            {"one_sm", 80, 1, 99 * 1024}};
  const char* wanted = std::getenv("KVCORE_SIMT_DEVICE");
  if (wanted == nullptr || *wanted == '\0') return kModels[0];
  for (const DeviceModel& model : kModels) {
    if (std::strcmp(model.name, wanted) == 0) return model;
  }
  throw std::runtime_error(std::string("KVCORE_SIMT_DEVICE must be one of sm_120, sm_80, sm_90, "
                                       "one_sm, got ") +
                           wanted);
}

}  // namespace kvcore::simt
