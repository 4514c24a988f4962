# kvcore._C: host-side objects in a pybind11 module. Free of torch, so it can be loaded without it.
if(NOT KVCORE_HOST)
  return()
endif()
file(GLOB host_sources CONFIGURE_DEPENDS csrc/host/*.cpp)
if(NOT host_sources)
  return()
endif()
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
set(PYBIND11_FINDPYTHON ON)
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  message(FATAL_ERROR "pybind11 was not found: pip install pybind11, or pass -DKVCORE_HOST=OFF")
endif()
# NO_EXTRAS: no LTO and no stripping, the flags are those of every other target.
pybind11_add_module(_C MODULE NO_EXTRAS ${host_sources} csrc/core/cpu/isa.cpp)
target_link_libraries(_C PRIVATE kvcore_flags)
string(JOIN " " KVCORE_FLAGS ${KVCORE_CXX_FLAGS})
# With semicolons it would be several definitions.
string(JOIN " " KVCORE_CUDA_ARCH_NAMES ${KVCORE_CUDA_BUILT})
target_compile_definitions(_C PRIVATE
  KVCORE_VERSION="${KVCORE_VERSION}"
  KVCORE_TORCH_TARGET=${KVCORE_TORCH_TARGET}
  KVCORE_CUDA_ARCHS="${KVCORE_CUDA_ARCH_NAMES}"
  KVCORE_FLAGS="${KVCORE_FLAGS}"
  KVCORE_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
  KVCORE_SANITIZED=$<BOOL:${KVCORE_SANITIZE}>)
install(TARGETS _C LIBRARY DESTINATION kvcore)
