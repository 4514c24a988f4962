# kvcore_simt: the CUDA kernels' own source, compiled by the host compiler over csrc/simt, with the
# ops above it in a namespace of their own, torch.ops.kvcore_simt. Tests only.
if(NOT KVCORE_SIMT)
  return()
endif()
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  message(FATAL_ERROR "KVCORE_SIMT=ON needs an x86-64 processor, got ${CMAKE_SYSTEM_PROCESSOR}")
endif()
if(KVCORE_SIMT_TSAN AND KVCORE_SANITIZE)
  message(FATAL_ERROR "KVCORE_SIMT_TSAN and KVCORE_SANITIZE exclude each other")
endif()

# A .cu file becomes a C++ file that includes it: its language is that of nvcc otherwise.
set(simt_kernel_sources "")
foreach(source IN LISTS cuda_sources)
  if(source MATCHES "\\.cu$")
    file(RELATIVE_PATH name ${CMAKE_CURRENT_SOURCE_DIR}/csrc ${source})
    set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/simt/${name}.cpp)
    file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${name}\"\n" @ONLY)
    list(APPEND simt_kernel_sources ${wrapper})
  else()
    list(APPEND simt_kernel_sources ${source})
  endif()
endforeach()

add_library(kvcore_simt MODULE
  csrc/ops.cpp ${cuda_op_sources} ${binding_sources} ${simt_kernel_sources} ${simt_sources})
target_link_libraries(kvcore_simt PRIVATE kvcore_flags torch_stable ${CMAKE_DL_LIBS})
target_compile_definitions(kvcore_simt PRIVATE
  KVCORE_LIBRARY=kvcore_simt KVCORE_DISPATCH_KEY=CPU
  KVCORE_SIMT_ASAN=$<BOOL:${KVCORE_SANITIZE}> KVCORE_SIMT_TSAN=$<BOOL:${KVCORE_SIMT_TSAN}>)
# Kernels say #pragma unroll.
target_compile_options(kvcore_simt PRIVATE -Wno-unknown-pragmas)
if(KVCORE_SIMT_TSAN)
  target_compile_options(kvcore_simt PRIVATE -fsanitize=thread -g)
  target_link_options(kvcore_simt PRIVATE -fsanitize=thread)
endif()
# The scheduler reads the stacks of suspended threads: see csrc/simt/sanitizer.h.
set_source_files_properties(${simt_sources} PROPERTIES COMPILE_OPTIONS "-fno-sanitize=all;-O2")
list(APPEND libraries kvcore_simt)
