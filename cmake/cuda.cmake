# kvcore_cuda: the CUDA backend. AUTO stays silent on a machine without CUDA: it builds only where
# there are sources, torch is a CUDA build and nvcc is found. No GPU is asked for.
string(TOUPPER "${KVCORE_CUDA}" cuda_wanted)
if(cuda_wanted MATCHES "^(1|TRUE|YES)$")
  set(cuda_wanted ON)
elseif(cuda_wanted MATCHES "^(0|FALSE|NO)$")
  set(cuda_wanted OFF)
elseif(NOT cuda_wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KVCORE_CUDA must be AUTO, ON or OFF, got '${KVCORE_CUDA}'")
endif()

set(KVCORE_CUDA_BUILT "")
if(cuda_wanted STREQUAL "OFF")
  return()
endif()
if(NOT cuda_sources)
  if(cuda_wanted STREQUAL "ON")
    message(FATAL_ERROR "KVCORE_CUDA=ON, but this version of kvcore has no CUDA sources")
  endif()
  return()
endif()
if(cuda_wanted STREQUAL "AUTO")
  # torch/version.py is read, not imported: importing torch takes seconds.
  file(READ ${TORCH_DIR}/version.py torch_version_py)
  if(NOT torch_version_py MATCHES "\ncuda[^=\n]*= *'[0-9]")
    return()
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT "$ENV{CUDACXX}" STREQUAL "")
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()
if(NOT CMAKE_CUDA_COMPILER)
  # Where the user points, not wherever CMake would look: what is found must be what is meant.
  find_program(KVCORE_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
  if(NOT KVCORE_NVCC)
    if(cuda_wanted STREQUAL "ON")
      message(FATAL_ERROR "KVCORE_CUDA=ON, but nvcc was not found: put it on PATH or set CUDA_HOME")
    endif()
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${KVCORE_NVCC})
endif()

set(CMAKE_CUDA_ARCHITECTURES ${KVCORE_CUDA_ARCHS})
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
add_library(kvcore_cuda MODULE
  ${cuda_op_sources} ${binding_sources} ${binding_cuda_sources} ${cuda_sources} ${sm90_sources})
target_link_libraries(kvcore_cuda PRIVATE kvcore_flags torch_stable CUDA::cudart_static)
target_compile_definitions(kvcore_cuda PRIVATE
  USE_CUDA KVCORE_LIBRARY=kvcore KVCORE_DISPATCH_KEY=CUDA)
# --fmad=false: as on the CPU, a product and a sum are fused where the source says so, and nowhere
# else; the quantized store is the same bits on every backend.
target_compile_options(kvcore_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
  --fmad=false --expt-relaxed-constexpr -lineinfo --compress-mode=size>)
list(APPEND libraries kvcore_cuda)
set(KVCORE_CUDA_BUILT ${KVCORE_CUDA_ARCHS})
