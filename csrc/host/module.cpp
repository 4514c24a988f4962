// kvcore._C: host-side objects and facts about the build. Python is the only caller; ops do not
// need this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "core/cpu/isa.h"
#include "host/page_allocator.h"
#include "turbo/layout.h"

namespace py = pybind11;

namespace kvcore::host {
namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

#define KVCORE_ISA_LEVEL_(level, ...) Isa::level,
constexpr Isa kBuilt[] = {KVCORE_FOR_EACH_ISA(KVCORE_ISA_LEVEL_)};
#undef KVCORE_ISA_LEVEL_

py::list isa_names(bool supported_only) {
  py::list names;
  for (const Isa isa : kBuilt) {
    if (!supported_only || isa_supported(isa)) names.append(isa_name(isa));
  }
  return names;
}

py::dict build_info() {
  constexpr uint64_t kTarget = KVCORE_TORCH_TARGET;
  py::dict info;
  info["version"] = KVCORE_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = KVCORE_FLAGS;
  info["build_type"] = KVCORE_BUILD_TYPE;
  info["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  // Major and minor version are the two highest bytes.
  info["torch_target"] = std::to_string(kTarget >> 56) + "." + std::to_string(kTarget >> 48 & 0xff);
  info["isa_levels"] = isa_names(false);
#if defined(KVCORE_AMX_MODEL)
  info["amx_model"] = true;
#else
  info["amx_model"] = false;
#endif
  info["cuda_archs"] = words(KVCORE_CUDA_ARCHS);
  info["sanitized"] = static_cast<bool>(KVCORE_SANITIZED);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  return info;
}

py::dict cpu_isa() {
  py::dict info;
  info["built"] = isa_names(false);
  info["supported"] = isa_names(true);
  info["active"] = isa_name(active_isa());
  py::dict obstacles, opt_in;
  for (const Isa isa : kBuilt) {
    if (!isa_supported(isa)) {
      obstacles[isa_name(isa)] = isa_obstacle(isa);
    } else if (const std::string reason = isa_opt_in(isa); !reason.empty()) {
      opt_in[isa_name(isa)] = reason;
    }
  }
  info["obstacles"] = obstacles;
  info["opt_in"] = opt_in;
  return info;
}

py::dict stats(const PageAllocator& allocator) {
  py::dict by_bits;
  for (const int bits : {8, 4, 2}) {
    const WidthStats width = allocator.stats(bits);
    py::dict row;
    row["num_slabs"] = width.num_slabs;
    row["num_blocks"] = width.num_blocks;
    row["num_used"] = width.num_used;
    row["num_free"] = width.num_blocks - width.num_used;
    by_bits[py::int_(bits)] = row;
  }
  return by_bits;
}

py::tuple get_state(const PageAllocator& allocator) {
  py::list slabs;
  for (const SlabState& slab : allocator.state()) {
    const auto* bytes = reinterpret_cast<const char*>(slab.used.data());
    slabs.append(py::make_tuple(slab.num_blocks, slab.bits,
                                py::bytes(bytes, slab.used.size() * sizeof(uint64_t))));
  }
  return py::make_tuple(slabs);
}

std::unique_ptr<PageAllocator> set_state(const py::tuple& state) {
  std::vector<SlabState> slabs;
  for (const py::handle item : state[0].cast<py::list>()) {
    const auto row = item.cast<py::tuple>();
    const auto bytes = row[2].cast<std::string>();
    SlabState slab{row[0].cast<int64_t>(), row[1].cast<int>(),
                   std::vector<uint64_t>(bytes.size() / sizeof(uint64_t))};
    std::memcpy(slab.used.data(), bytes.data(), slab.used.size() * sizeof(uint64_t));
    slabs.push_back(std::move(slab));
  }
  return std::make_unique<PageAllocator>(std::move(slabs));
}

void keep(PageAllocator& allocator, const py::buffer& entries) {
  const py::buffer_info info = entries.request();
  if (info.ndim != 1 || !info.item_type_is_equivalent_to<int32_t>() ||
      info.strides[0] != sizeof(int32_t)) {
    throw std::invalid_argument("PageAllocator.keep: entries must be a contiguous int32 vector");
  }
  allocator.keep({static_cast<const int32_t*>(info.ptr), static_cast<size_t>(info.size)});
}

void bind_page_allocator(py::module_& m) {
  py::register_exception<OutOfBlocks>(m, "OutOfBlocksError", PyExc_MemoryError);
  py::class_<PageAllocator> cls(m, "PageAllocator", R"(Which blocks of a store's slabs are in use.

A slab is one tensor of blocks of one bit width (8, 4 or 2); an entry is the int32 of a block table,
``slab << 21 | index``. The allocator hands out entries and holds no memory of the blocks. A call
does all it was asked or raises and changes nothing; copying and pickling keep the state.)");
  cls.def(py::init<>())
      .def("add_slab", &PageAllocator::add_slab, py::arg("num_blocks"), py::arg("bits"),
           R"(Adds a slab of free blocks and returns its number: 0, 1, 2, ...

Raises ValueError for num_blocks outside [1, 2097152] or bits not 8, 4 or 2, and OutOfBlocksError
when 1024 slabs exist.)")
      .def("allocate", &PageAllocator::allocate, py::arg("bits"), py::arg("count"),
           R"(The ``count`` lowest free entries of that width as a list of int, ascending.

Raises OutOfBlocksError, a MemoryError, when there are fewer.)")
      .def("free", &PageAllocator::free, py::arg("entries"),
           R"(Returns blocks. Raises ValueError naming the first entry that is not in use.)")
      .def("keep", &keep, py::arg("entries"),
           R"(Frees every block that is not among ``entries``, a contiguous buffer of int32.

An entry may repeat, as it does in a block table whose rows share blocks. Raises ValueError naming
the first entry that is not of a block in use.)")
      .def(
          "num_free",
          [](const PageAllocator& self, int64_t bits) {
            const WidthStats width = self.stats(bits);
            return width.num_blocks - width.num_used;
          },
          py::arg("bits"), "Free blocks of that width.")
      .def(
          "num_used",
          [](const PageAllocator& self, int64_t bits) { return self.stats(bits).num_used; },
          py::arg("bits"), "Blocks of that width in use.")
      .def("stats", &stats,
           "Per width 8, 4 and 2: a dict of num_slabs, num_blocks, num_used and num_free.")
      .def(py::pickle(&get_state, &set_state));
  cls.attr("MAX_SLABS") = turbo::kMaxSlabs;
  cls.attr("MAX_SLAB_BLOCKS") = turbo::kMaxSlabBlocks;
}

}  // namespace

// The allocator locks itself and the rest is constant, so free-threaded Python need not take the
// GIL back for this module.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Host-side objects of kvcore and facts about its build.";
  m.def("build_info", &build_info,
        "version, compiler, flags, build_type, cxx_standard, torch_target (oldest torch), "
        "isa_levels, cuda_archs (empty: no CUDA library), sanitized, pybind11.");
  m.def("cpu_isa", &cpu_isa,
        "CPU ISA levels, lowest first: built, supported by this machine, and the active one; "
        "obstacles, why others are not supported; opt_in, why supported ones run only where "
        "KVCORE_CPU_ISA names them. "
        "Raises RuntimeError if KVCORE_CPU_ISA names none of the supported.");
  bind_page_allocator(m);
}

}  // namespace kvcore::host
