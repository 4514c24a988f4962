// A stack of its own for every CUDA thread, and the switch between them. x86-64.
#pragma once

#include <cstddef>

namespace kvcore::simt {

/// What the switch keeps of a suspended context, the sanitizers' view of it included.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;  // ThreadSanitizer's

  /// The context of the running thread; its stack becomes known at the first switch away from it.
  static Context of_thread();
  /// One with a stack and a guard page below it, to be started with `start`.
  static Context with_stack();
  /// Of a context made by with_stack.
  void free();
  /// Orders all that the context has done before what the caller does next.
  void join();
  /// The next switch to this context calls entry(), which must not return.
  void start(void (*entry)());
};

/// Suspends `from`, the running context, and continues `to`.
void switch_context(Context& from, Context& to);
/// The same, when `from` will never be continued.
void leave_context(Context& from, Context& to);
/// First thing in entry(), with the context that was switched from.
void arrive(Context& from);

}  // namespace kvcore::simt
