#include "core/cpu/isa.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvcore {
namespace {

#define KVCORE_ISA_LEVEL_(level, ...) Isa::level,
constexpr Isa kBuilt[] = {KVCORE_FOR_EACH_ISA(KVCORE_ISA_LEVEL_)};
#undef KVCORE_ISA_LEVEL_

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
    const bool amx_bf16 = d7 >> 22 & 1, amx_tile = d7 >> 24 & 1, amx_int8 = d7 >> 25 & 1;
    uint32_t a71, b71, c71, d71;
    const bool bf16 = __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && (a71 >> 5 & 1);
    avx512_bf16 = avx512_vnni && bf16;
    amx = avx512_bf16 && saves(0x60000) && amx_tile && amx_int8 && amx_bf16;
  }
};

const X86Features& x86_features() {
  static const X86Features features;
  return features;
}

// Why this process may not use the tiles, which need a permission of Linux: their registers are 8
// KiB per thread, saved only for those who asked. Empty if it may.
std::string tile_obstacle() {
#if defined(KVCORE_AMX_MODEL)
  return x86_features().avx512_bf16 ? "" : "this CPU does not have AVX-512 VNNI and BF16";
#elif defined(__linux__)
  if (!x86_features().amx) return "this CPU or operating system does not have AMX";
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the operating system refuses the tile registers (") + strerror(errno) + ")";
#else
  return "only Linux is known to grant the tile registers";
#endif
}

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

bool isa_supported(Isa isa) { return isa_obstacle(isa).empty(); }

std::string isa_obstacle(Isa isa) {
#if defined(__x86_64__)
  const X86Features& features = x86_features();
  const auto unless = [](bool supported) {
    return supported ? "" : "this CPU or operating system does not support it";
  };
  switch (isa) {
    case Isa::scalar:
      return "";
    case Isa::avx2:
      return unless(features.avx2);
    case Isa::avx512:
      return unless(features.avx512);
    case Isa::avx512_vnni:
      return unless(features.avx512_vnni);
    case Isa::avx512_bf16:
      return unless(features.avx512_bf16);
    case Isa::amx: {
      static const std::string obstacle = tile_obstacle();
      return obstacle;
    }
  }
  return "unknown level";
#else
  return isa == Isa::scalar ? "" : "this is not an x86-64 CPU";
#endif
}

std::string isa_opt_in(Isa isa) {
  return isa == Isa::amx ? "its tiles have never run on hardware, only on a software model" : "";
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
      // Asked in this order: whether a level is supported may take a permission of the system.
      const bool chosen = any ? isa_opt_in(*it).empty() : std::string(wanted) == isa_name(*it);
      if (chosen && isa_supported(*it)) return *it;
    }
    std::string message = "KVCORE_CPU_ISA must be one of " + available_isas() +
                          " on this machine, got '" + wanted + "'";
    for (const Isa isa : kBuilt) {
      if (std::string(wanted) == isa_name(isa)) message += ": " + isa_obstacle(isa);
    }
    throw std::runtime_error(message);
  }();
  return active;
}

}  // namespace kvcore
