// What the parts of wrappers.cu share: memory of the device, inputs, results.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "core/cuda/launch.cuh"

namespace wrappers {

using namespace kvcore;

// ---- Memory of the device

template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : count_(values.size()) {
#ifdef __CUDACC__
    detail::check_cuda(cudaMalloc(&data_, count_ * sizeof(T)), "cudaMalloc");
    detail::check_cuda(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
                       "cudaMemcpy");
#else
    values_ = values;
    data_ = values_.data();
#endif
  }
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }

  std::vector<T> values() {
#ifdef __CUDACC__
    std::vector<T> result(count_);
    detail::check_cuda(cudaMemcpy(result.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
                       "cudaMemcpy");
    return result;
#else
    return values_;
#endif
  }

 private:
  size_t count_;
  T* data_ = nullptr;
#ifndef __CUDACC__
  std::vector<T> values_;
#endif
};

// ---- Inputs: the same on every machine

inline uint32_t next_random(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state ^ state >> 16;
}

inline std::vector<uint32_t> zeros(size_t count) { return std::vector<uint32_t>(count, 0); }

inline std::vector<uint32_t> random_words(size_t count, uint32_t seed) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = next_random(seed);
  return words;
}

// Floats of every exponent and sign: 2^16 patterns in steps, then the edges.
inline std::vector<uint32_t> float_patterns() {
  std::vector<uint32_t> bits;
  for (uint64_t x = 0; x < uint64_t{1} << 32; x += 65537) bits.push_back(static_cast<uint32_t>(x));
  for (const uint32_t x : {0u, 1u, 0x7fffffu, 0x800000u, 0x3f800000u, 0x7f7fffffu, 0x7f800000u,
                           0x7fc00000u, 0x477fefffu, 0x477ff000u, 0x33000000u, 0x33000001u,
                           0x38800000u, 0x387fffffu, 0x4f000000u, 0x4effffffu, 0x4f800000u}) {
    bits.push_back(x);
    bits.push_back(x | 0x80000000u);
  }
  for (int i = -300; i <= 300; ++i) {  // halves, between which conversions choose
    const float x = 0.25f * static_cast<float>(i);
    uint32_t word;
    std::memcpy(&word, &x, 4);
    bits.push_back(word);
  }
  while (bits.size() % 256 != 0) bits.push_back(0);
  return bits;
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- Results

inline std::string folder;
inline bool failed = false;

inline void save(const std::string& name, const void* data, size_t bytes) {
  if (folder.empty()) return;
  std::ofstream(folder + "/" + name + ".bin", std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
}

template <class T>
void exact(const std::string& name, const std::vector<T>& values) {
  uint64_t hash = 14695981039346656037u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  std::printf("exact %s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
  save(name, values.data(), values.size() * sizeof(T));
}

// NaN payloads are not part of what is promised.
inline void exact_floats(const std::string& name, std::vector<uint32_t> bits) {
  for (uint32_t& x : bits) {
    if ((x & 0x7fffffffu) > 0x7f800000u) x = 0x7fc00000u;
  }
  exact(name, bits);
}

// `worst` is in units of what is allowed; NaN fails.
inline void bound(const std::string& name, double worst) {
  const bool ok = worst <= 1;
  failed = failed || !ok;
  std::printf("bound %s %s %.3f\n", name.c_str(), ok ? "ok" : "FAIL", worst);
}

}  // namespace wrappers
