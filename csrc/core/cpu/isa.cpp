#include "core/cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvcore {
namespace {

#define KVCORE_ISA_LEVEL_(level) Isa::level,
constexpr Isa kBuilt[] = {KVCORE_FOR_EACH_ISA(KVCORE_ISA_LEVEL_)};
#undef KVCORE_ISA_LEVEL_

// isa_select indexes its table with the enumerator.
constexpr bool levels_are_consecutive() {
  for (int i = 0; i < static_cast<int>(std::size(kBuilt)); ++i) {
    if (static_cast<int>(kBuilt[i]) != i) return false;
  }
  return true;
}
static_assert(levels_are_consecutive());

#if defined(__x86_64__)

__attribute__((target("xsave"))) uint64_t enabled_register_state() { return _xgetbv(0); }

struct X86Features {
  bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, amx = false;

  X86Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx) return;
    const uint64_t state = enabled_register_state();
    const auto saves = [state](uint64_t mask) { return (state & mask) == mask; };
    uint32_t b7, c7, d7;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return;
    // XCR0: 0x6 is XMM and YMM, 0xe0 opmask and ZMM, 0x60000 the AMX tiles.
    avx2 = saves(0x6) && fma && f16c && (b7 >> 5 & 1);
    const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
    avx512 = avx2 && saves(0xe0) && f && dq && bw && vl;
    avx512_vnni = avx512 && (c7 >> 11 & 1);
    const bool amx_tile = d7 >> 24 & 1, amx_int8 = d7 >> 25 & 1;
    uint32_t a71, b71, c71, d71;
    const bool bf16 = __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && (a71 >> 5 & 1);
    avx512_bf16 = avx512_vnni && bf16;
    amx = avx512_vnni && saves(0x60000) && amx_tile && amx_int8;
  }
};

#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  static const X86Features features;
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return features.avx2;
    case Isa::avx512:
      return features.avx512;
    case Isa::avx512_vnni:
      return features.avx512_vnni;
    case Isa::avx512_bf16:
      return features.avx512_bf16;
    case Isa::amx:
      return features.amx;
  }
  return false;
#else
  return isa == Isa::scalar;
#endif
}

std::string available_isas() {
  std::string names;
  for (const Isa isa : kBuilt) {
    if (isa_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa active_isa() {
  // A throwing initializer leaves the static unset, so every call reports a bad variable.
  static const Isa active = [] {
    const char* wanted = std::getenv("KVCORE_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    for (auto it = std::rbegin(kBuilt); it != std::rend(kBuilt); ++it) {
      if (isa_supported(*it) && (any || std::string(wanted) == isa_name(*it))) return *it;
    }
    throw std::runtime_error("KVCORE_CPU_ISA must be one of " + available_isas() +
                             " on this machine, got '" + wanted + "'");
  }();
  return active;
}

}  // namespace kvcore
