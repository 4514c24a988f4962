// Atomic functions. They order memory, which CUDA's do not: see simt.h on what is not modelled.
#pragma once

#include <cstring>

template <class T>
inline T atomicExch(T* address, T value) {
  T old;
  __atomic_exchange(address, &value, &old, __ATOMIC_ACQ_REL);
  return old;
}

template <class T>
inline T atomicCAS(T* address, T expected, T value) {
  __atomic_compare_exchange(address, &expected, &value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

namespace kvcore::simt {

template <class T, class F>
inline T atomic_update(T* address, F&& f) {
  T old;
  __atomic_load(address, &old, __ATOMIC_ACQUIRE);
  for (;;) {
    T next = f(old);
    if (__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_ACQ_REL,
                                  __ATOMIC_ACQUIRE)) {
      return old;
    }
  }
}

}  // namespace kvcore::simt

// For the types of CUDA's overloads; each returns the old value.
inline int atomicAdd(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline float atomicAdd(float* address, float value) {
  return kvcore::simt::atomic_update(address, [value](float old) { return old + value; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return kvcore::simt::atomic_update(address,
                                     [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline int atomicMax(int* address, int value) {
  return kvcore::simt::atomic_update(address,
                                     [value](int old) { return old > value ? old : value; });
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return kvcore::simt::atomic_update(address,
                                     [value](unsigned old) { return old > value ? old : value; });
}
inline int atomicMin(int* address, int value) {
  return kvcore::simt::atomic_update(address,
                                     [value](int old) { return old < value ? old : value; });
}
inline unsigned atomicMin(unsigned* address, unsigned value) {
  return kvcore::simt::atomic_update(address,
                                     [value](unsigned old) { return old < value ? old : value; });
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned atomicAnd(unsigned* address, unsigned value) {
  return __atomic_fetch_and(address, value, __ATOMIC_ACQ_REL);
}
