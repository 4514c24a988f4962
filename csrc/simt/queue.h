// A queue of bounded length.
#pragma once

#include <cstddef>

namespace kvcore::simt {

// What runs on a fiber must neither allocate nor call memmove: ThreadSanitizer sees those even in
// sources that it does not instrument, and would take them for races between CUDA threads.
template <class T, size_t kCapacity>
class Queue {
 public:
  size_t size() const { return end_ - begin_; }
  bool full() const { return size() == kCapacity; }
  T& operator[](size_t i) { return items_[(begin_ + i) % kCapacity]; }
  void push(const T& item) { items_[end_++ % kCapacity] = item; }
  T pop() { return items_[begin_++ % kCapacity]; }
  void clear() { begin_ = end_ = 0; }

 private:
  size_t begin_ = 0, end_ = 0;
  T items_[kCapacity];
};

}  // namespace kvcore::simt
