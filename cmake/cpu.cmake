# kvcore_cpu: the schemas and the CPU backend. Every *_kernel.cpp is compiled once per ISA level,
# in namespace KVCORE_ISA; the level is chosen at run time (csrc/core/cpu/isa.h).
set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(avx512_vnni_flags ${avx512_flags} -mavx512vnni)
set(avx512_bf16_flags ${avx512_vnni_flags} -mavx512bf16)
set(scalar_flags "")
# A new level goes here, in csrc/core/cpu/isa.h and in isa.cpp.
set(KVCORE_ISA_LEVELS scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND KVCORE_ISA_LEVELS avx2 avx512 avx512_vnni avx512_bf16)
endif()

add_library(kvcore_cpu MODULE
  csrc/ops.cpp ${op_sources} ${binding_sources} ${core_cpu_sources} ${cpu_sources})
target_link_libraries(kvcore_cpu PRIVATE kvcore_flags torch_stable)
target_compile_definitions(kvcore_cpu PRIVATE KVCORE_LIBRARY=kvcore KVCORE_DISPATCH_KEY=CPU)
if(cpu_kernel_sources)
  foreach(level IN LISTS KVCORE_ISA_LEVELS)
    add_library(kvcore_kernels_${level} OBJECT ${cpu_kernel_sources})
    target_link_libraries(kvcore_kernels_${level} PRIVATE kvcore_flags)
    string(TOUPPER ${level} upper)
    target_compile_definitions(kvcore_kernels_${level} PRIVATE
      KVCORE_ISA=${level} KVCORE_ISA_${upper}=1)
    target_compile_options(kvcore_kernels_${level} PRIVATE ${${level}_flags})
    target_sources(kvcore_cpu PRIVATE $<TARGET_OBJECTS:kvcore_kernels_${level}>)
  endforeach()
endif()
list(APPEND libraries kvcore_cpu)
