#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "simt/sanitizer.h"

#ifndef __x86_64__
#error "the SIMT build needs x86-64"
#endif

extern "C" void kvcore_simt_swap(void** save, void* restore);
// Callee-saved registers go onto the old stack; the new one's come back.
asm(R"(
.text
.globl kvcore_simt_swap
.hidden kvcore_simt_swap
.type kvcore_simt_swap, @function
kvcore_simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvcore_simt_swap, .-kvcore_simt_swap
)");

namespace kvcore::simt {
namespace {

// Kernels keep fragments in registers: 64 KB of locals is far beyond any of them, but the
// sanitizers pad each variable, and symbolizing a report needs room too.
constexpr size_t kStackBytes = 256 * 1024;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void swap(Context& from, Context& to, [[maybe_unused]] void** fake_stack) {
#if KVCORE_SIMT_ASAN
  __sanitizer_start_switch_fiber(fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if KVCORE_SIMT_TSAN
  // 1: no happens-before edge, or every race between two threads of a block would be hidden.
  __tsan_switch_to_fiber(to.tsan_fiber, 1);
#endif
  kvcore_simt_swap(&from.stack_pointer, to.stack_pointer);
#if KVCORE_SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace

Context Context::of_thread() {
  Context context;
#if KVCORE_SIMT_TSAN
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
  return context;
}

Context Context::with_stack() {
  const size_t guard = page_bytes();
  void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard, PROT_NONE);
  Context context;
  context.stack_bottom = static_cast<char*>(memory) + guard;
  context.stack_bytes = kStackBytes;
  return context;
}

void Context::free() {
#if KVCORE_SIMT_TSAN
  if (tsan_fiber != nullptr) __tsan_destroy_fiber(tsan_fiber);
#endif
  const size_t guard = page_bytes();
  munmap(static_cast<char*>(const_cast<void*>(stack_bottom)) - guard, stack_bytes + guard);
}

void Context::join() {
#if KVCORE_SIMT_TSAN
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber, 1);
  tsan_release(&tsan_fiber);
  __tsan_switch_to_fiber(caller, 1);
  tsan_acquire(&tsan_fiber);
#endif
}

void Context::start(void (*entry)()) {
  char* bottom = static_cast<char*>(const_cast<void*>(stack_bottom));
#if KVCORE_SIMT_ASAN
  // What ran here before may have been left in the middle of a function.
  __asan_unpoison_memory_region(bottom, stack_bytes);
  fake_stack = nullptr;
#endif
#if KVCORE_SIMT_TSAN
  if (tsan_fiber == nullptr) tsan_fiber = __tsan_create_fiber(0);
#endif
  // Six registers and the address to return to; entry() finds the alignment that a call leaves,
  // and a null return address ends every stack trace.
  void** top = reinterpret_cast<void**>(bottom + stack_bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer = top;
}

void switch_context(Context& from, Context& to) { swap(from, to, &from.fake_stack); }

void leave_context(Context& from, Context& to) { swap(from, to, nullptr); }

void arrive([[maybe_unused]] Context& from) {
#if KVCORE_SIMT_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // A thread's own stack is not known before it is left for the first time.
  if (from.stack_bottom == nullptr) {
    from.stack_bottom = bottom;
    from.stack_bytes = bytes;
  }
#endif
}

}  // namespace kvcore::simt
