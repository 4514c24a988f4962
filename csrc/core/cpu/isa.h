// CPU ISA levels: which exist in this build, which this CPU and operating system can run, and
// which one is active.
//
// Every <family>/cpu/*_kernel.cpp is compiled once per level with -DKVCORE_ISA=<level> and
// -DKVCORE_ISA_<LEVEL>=1; all it defines lives in namespace kvcore::<family>::KVCORE_ISA (or
// kvcore::KVCORE_ISA for shared headers). An inline function outside that namespace would be
// merged by the linker into one copy for all levels, and an AVX-512 copy crashes an AVX2 machine.
#pragma once

#include <string>

namespace kvcore {

enum class Isa : int { scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx };

// Levels of this build, lowest first; cmake/cpu.cmake compiles the same list.
#if defined(__x86_64__)
#define KVCORE_FOR_EACH_ISA(X) X(scalar) X(avx2) X(avx512) X(avx512_vnni) X(avx512_bf16)
#else
#define KVCORE_FOR_EACH_ISA(X) X(scalar)
#endif

const char* isa_name(Isa isa);

// The CPU has the instructions and the operating system saves the registers.
bool isa_supported(Isa isa);

// The level that kernels run at: the highest that is built and supported, or the one that the
// environment variable KVCORE_CPU_ISA names. Decided at the first call and kept. Throws
// std::runtime_error if the variable names a level that is unknown or not supported here.
Isa active_isa();

// Names of the levels that are built and supported, lowest first, joined by ", ".
std::string available_isas();

}  // namespace kvcore

// Declares a kernel in the namespace of every level of this build:
//   namespace kvcore::turbo {
//   KVCORE_ISA_DECLARE(void attention_kernel(const AttentionParams& p, int64_t begin, int64_t end))
//   }
#define KVCORE_ISA_DECLARE_SCALAR(...) \
  namespace scalar {                   \
  __VA_ARGS__;                         \
  }
#if defined(__x86_64__)
#define KVCORE_ISA_DECLARE(...)          \
  KVCORE_ISA_DECLARE_SCALAR(__VA_ARGS__) \
  namespace avx2 {                       \
  __VA_ARGS__;                           \
  }                                      \
  namespace avx512 {                     \
  __VA_ARGS__;                           \
  }                                      \
  namespace avx512_vnni {                \
  __VA_ARGS__;                           \
  }                                      \
  namespace avx512_bf16 {                \
  __VA_ARGS__;                           \
  }
#else
#define KVCORE_ISA_DECLARE(...) KVCORE_ISA_DECLARE_SCALAR(__VA_ARGS__)
#endif

// Pointer to the active level's copy of a function declared so:
//   auto* kernel = KVCORE_ISA_SELECT(attention_kernel);
#if defined(__x86_64__)
#define KVCORE_ISA_SELECT(function)                                           \
  ::kvcore::isa_select(&scalar::function, &avx2::function, &avx512::function, \
                       &avx512_vnni::function, &avx512_bf16::function)
#else
#define KVCORE_ISA_SELECT(function) ::kvcore::isa_select(&scalar::function)
#endif

namespace kvcore {

// The entry of the active level from one entry per level of this build, lowest first.
template <class Function, class... Functions>
Function* isa_select(Function* lowest, Functions*... others) {
  Function* const table[] = {lowest, others...};
  return table[static_cast<int>(active_isa())];
}

}  // namespace kvcore
