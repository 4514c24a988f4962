// Which sanitizer instruments the kernels. The shim's own sources are compiled without any (they
// read the stacks of suspended threads), so the build says it: KVCORE_SIMT_ASAN, KVCORE_SIMT_TSAN.
#pragma once

#ifndef KVCORE_SIMT_ASAN
#define KVCORE_SIMT_ASAN 0
#endif
#ifndef KVCORE_SIMT_TSAN
#define KVCORE_SIMT_TSAN 0
#endif

#if KVCORE_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if KVCORE_SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

namespace kvcore::simt {

/// Orders what came before a release of `address` before what follows an acquire of it.
inline void tsan_release([[maybe_unused]] void* address) {
#if KVCORE_SIMT_TSAN
  __tsan_release(address);
#endif
}
inline void tsan_acquire([[maybe_unused]] void* address) {
#if KVCORE_SIMT_TSAN
  __tsan_acquire(address);
#endif
}

}  // namespace kvcore::simt
