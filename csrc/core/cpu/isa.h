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

const char* isa_name(Isa isa);

// The CPU has the instructions and the operating system saves the registers.
bool isa_supported(Isa isa);

// Why a level is not supported here, in a few words; empty if it is.
std::string isa_obstacle(Isa isa);

// Why a level runs only where KVCORE_CPU_ISA names it, in a few words; empty if it needs no naming.
std::string isa_opt_in(Isa isa);

// The level that kernels run at: the one that the environment variable KVCORE_CPU_ISA names, or the
// highest that is built, supported and not opt-in. Decided at the first call and kept. Throws
// std::runtime_error if the variable names a level that is unknown or not supported here.
Isa active_isa();

// Names of the levels that are built and supported, lowest first, joined by ", ".
std::string available_isas();

}  // namespace kvcore

// X(level, ...) for each level of this build, lowest first; cmake/cpu.cmake defines KVCORE_BUILD_*.
#if defined(KVCORE_BUILD_AVX2)
#define KVCORE_IF_AVX2_(X, ...) X(avx2, __VA_ARGS__)
#else
#define KVCORE_IF_AVX2_(X, ...)
#endif
#if defined(KVCORE_BUILD_AVX512)
#define KVCORE_IF_AVX512_(X, ...) X(avx512, __VA_ARGS__)
#else
#define KVCORE_IF_AVX512_(X, ...)
#endif
#if defined(KVCORE_BUILD_AVX512_VNNI)
#define KVCORE_IF_AVX512_VNNI_(X, ...) X(avx512_vnni, __VA_ARGS__)
#else
#define KVCORE_IF_AVX512_VNNI_(X, ...)
#endif
#if defined(KVCORE_BUILD_AVX512_BF16)
#define KVCORE_IF_AVX512_BF16_(X, ...) X(avx512_bf16, __VA_ARGS__)
#else
#define KVCORE_IF_AVX512_BF16_(X, ...)
#endif
#if defined(KVCORE_BUILD_AMX)
#define KVCORE_IF_AMX_(X, ...) X(amx, __VA_ARGS__)
#else
#define KVCORE_IF_AMX_(X, ...)
#endif
#define KVCORE_FOR_EACH_ISA(X, ...)      \
  X(scalar, __VA_ARGS__)                 \
  KVCORE_IF_AVX2_(X, __VA_ARGS__)        \
  KVCORE_IF_AVX512_(X, __VA_ARGS__)      \
  KVCORE_IF_AVX512_VNNI_(X, __VA_ARGS__) \
  KVCORE_IF_AVX512_BF16_(X, __VA_ARGS__) \
  KVCORE_IF_AMX_(X, __VA_ARGS__)

// Declares a kernel in the namespace of every level of this build:
//   namespace kvcore::turbo {
//   KVCORE_ISA_DECLARE(void attention_kernel(const AttentionParams& p, int64_t begin, int64_t end))
//   }
#define KVCORE_ISA_DECLARE_(level, ...) \
  namespace level {                     \
  __VA_ARGS__;                          \
  }
#define KVCORE_ISA_DECLARE(...) KVCORE_FOR_EACH_ISA(KVCORE_ISA_DECLARE_, __VA_ARGS__)

// Pointer to the active level's copy of a function declared so:
//   auto* kernel = KVCORE_ISA_SELECT(attention_kernel);
#define KVCORE_ISA_CASE_(level, function) \
  case ::kvcore::Isa::level:              \
    return &level::function;
#define KVCORE_ISA_SELECT(function)                               \
  [] {                                                            \
    switch (::kvcore::active_isa()) {                             \
      KVCORE_FOR_EACH_ISA(KVCORE_ISA_CASE_, function)             \
      default:                                                    \
        return static_cast<decltype(&scalar::function)>(nullptr); \
    }                                                             \
  }()
