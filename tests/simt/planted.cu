// Right kernels, and the same with one bug each: `planted NAME` runs one of them through the SIMT
// shim and exits 0 if its result is right. A bug must be found: by the shim (exit 2 and a message),
// by a wrong result (exit 3), or by the sanitizer that the program is compiled with.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/cuda/copy.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/reduce.cuh"

namespace planted {

using namespace kvcore;

constexpr int kThreads = 128;
constexpr int kElements = 1000;

float* smem_floats() { return reinterpret_cast<float*>(dynamic_smem()); }

// ---- Global memory

__global__ void scale(float* x, int n, float factor) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] *= factor;
}

bool run_scale(int n) {
  const auto x = std::make_unique<float[]>(kElements);  // exact size: ASan sees what follows
  for (int i = 0; i < kElements; ++i) x[i] = static_cast<float>(i);
  launch(scale, 8, kThreads, 0, nullptr, x.get(), n, 2.0f);
  for (int i = 0; i < kElements; ++i) {
    if (x[i] != 2.0f * static_cast<float>(i)) return false;
  }
  return true;
}

// ---- Shared memory: a block reverses its elements

enum class Reverse { kRight, kNoBarrier, kOverrun, kUnwritten, kDivergentBarrier, kLostBarrier };

template <Reverse kHow>
__global__ void reverse(const float* in, float* out) {
  float* tile = smem_floats();
  const int i = static_cast<int>(threadIdx.x);
  const bool writes = kHow != Reverse::kUnwritten || i != 77;
  if (writes) tile[i] = in[i];
  if (kHow == Reverse::kOverrun && i == 0) reinterpret_cast<char*>(tile)[4 * kThreads] = 1;
  if (kHow == Reverse::kDivergentBarrier) {
    if (i < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kHow == Reverse::kLostBarrier) {
    if (i != 5) __syncthreads();
    __syncwarp();
  } else if (kHow != Reverse::kNoBarrier) {
    __syncthreads();
  }
  out[i] = tile[kThreads - 1 - i];
}

template <Reverse kHow>
bool run_reverse() {
  std::vector<float> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  launch(reverse<kHow>, 1, kThreads, 4 * kThreads, nullptr, in.data(), out.data());
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != in[kThreads - 1 - i]) return false;
  }
  return true;
}

// ---- Asynchronous copies: two stages, the sum of four tiles

enum class Copy { kRight, kNoWait, kWaitsForTooFew, kNoBarrier, kEarlyReuse };

template <Copy kHow>
__global__ void sum_tiles(const float* in, float* out) {
  float* stages = smem_floats();
  const int i = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < 4 && i < kThreads / 4) {
      cp_async_16(stages + tile % 2 * kThreads + 4 * i, in + tile * kThreads + 4 * i);
    }
    cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  if (kHow == Copy::kEarlyReuse) fetch(1);
  for (int tile = 0; tile < 4; ++tile) {
    fetch(tile + (kHow == Copy::kEarlyReuse ? 2 : 1));
    if (kHow == Copy::kWaitsForTooFew) {
      cp_async_wait<2>();
    } else if (kHow != Copy::kNoWait) {
      cp_async_wait<1>();
    }
    if (kHow != Copy::kNoBarrier) __syncthreads();
    sum += stages[tile % 2 * kThreads + (i + 32) % kThreads];
    __syncthreads();
  }
  out[i] = sum;
}

template <Copy kHow>
bool run_copy() {
  std::vector<float> in(4 * kThreads), out(kThreads);
  for (int i = 0; i < 4 * kThreads; ++i) in[i] = static_cast<float>(i % 97);
  launch(sum_tiles<kHow>, 1, kThreads, 8 * kThreads, nullptr, in.data(), out.data());
  for (int i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (int tile = 0; tile < 4; ++tile) sum += in[tile * kThreads + (i + 32) % kThreads];
    if (out[i] != sum) return false;
  }
  return true;
}

// ---- Warps

enum class Warp { kRight, kDivergent, kNotInMask, kReturned, kNoSyncwarp, kHalves };

template <Warp kHow>
__global__ void warp_sums(const float* in, float* out) {
  const int i = static_cast<int>(threadIdx.x), lane = i % kWarpSize;
  float x = in[i];
  if (kHow == Warp::kDivergent && lane == 3) __syncwarp();
  if (kHow == Warp::kNotInMask) x += __shfl_xor_sync(0xffff, x, 1);
  if (kHow == Warp::kHalves) {
    // Lanes of one half go on while those of the other still wait: disjoint masks are independent.
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    for (int distance = 8; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(half, x, distance);
    }
    __syncwarp();
    x += __shfl_xor_sync(kAllLanes, x, 16);
  } else if (kHow == Warp::kNoSyncwarp) {
    float* tile = smem_floats();
    tile[i] = x;
    x += tile[i ^ 1];
    __syncwarp();
    for (int distance = 16; distance > 1; distance /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, distance);
    }
  } else {
    x = warp_sum(x);
  }
  if (kHow == Warp::kReturned) {
    if (lane == 31) return;
    int32_t d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    mma_m16n8k32_s8(d, a, b);
    x += static_cast<float>(d[0]);
  }
  out[i] = x;
}

template <Warp kHow>
bool run_warp() {
  std::vector<float> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  launch(warp_sums<kHow>, 1, kThreads, 4 * kThreads, nullptr, in.data(), out.data());
  for (int i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) sum += in[j];
    if (out[i] != sum) return false;
  }
  return true;
}

// ---- Races that leave the result right

template <bool kAtomic>
__global__ void count(int* counter) {
  if (threadIdx.x % 32 != 0) return;
  if (kAtomic) {
    atomicAdd(counter, 1);
  } else {
    *counter += 1;
  }
}

template <bool kAtomic>
bool run_count(unsigned blocks, unsigned threads) {
  int counter = 0;
  launch(count<kAtomic>, blocks, threads, 0, nullptr, &counter);
  return counter == static_cast<int>(blocks * threads / 32);
}

// ---- Alignment

template <int kOffset, bool kRaw>
__global__ void copy_vectors(const float* in, float* out) {
  const float* from = in + kOffset + 4 * threadIdx.x;
  float* to = out + 4 * threadIdx.x;
  if (kRaw) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    store_16(to, load_16(from));
  }
}

template <int kOffset, bool kRaw>
bool run_vectors() {
  alignas(16) float in[4 * 32 + 4], out[4 * 32] = {};
  for (int i = 0; i < 4 * 32 + 4; ++i) in[i] = static_cast<float>(i);
  launch(copy_vectors<kOffset, kRaw>, 1, 32, 0, nullptr, static_cast<const float*>(in),
         static_cast<float*>(out));
  return out[5] == in[5 + kOffset];
}

template <int kOffset>
__global__ void load_matrix(uint32_t* out) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_smem());
  for (int i = 0; i < 4; ++i) tile[4 * threadIdx.x + i] = 4 * threadIdx.x + i;
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, tile + 4 * threadIdx.x + kOffset);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

// One matrix after the other, and a lane's row and pair are its own place in it.
template <int kOffset>
bool run_ldmatrix() {
  std::vector<uint32_t> out(128);
  launch(load_matrix<kOffset>, 1, 32, 512, nullptr, out.data());
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t i = 0; i < 4; ++i) {
      if (out[4 * lane + i] != 32 * i + lane) return false;
    }
  }
  return true;
}

// ---- Launches

bool run_launch(dim3 grid, dim3 block, size_t smem_bytes) {
  float x = 1;
  launch(scale, grid, block, smem_bytes, nullptr, &x, 0, 2.0f);
  return x == 1;
}

struct Case {
  const char* name;
  bool (*run)();
};

const Case kCases[] = {
    {"right_global", [] { return run_scale(kElements); }},
    {"global_out_of_bounds", [] { return run_scale(kElements + 1); }},
    {"right_shared", run_reverse<Reverse::kRight>},
    {"missing_barrier", run_reverse<Reverse::kNoBarrier>},
    {"shared_overrun", run_reverse<Reverse::kOverrun>},
    {"shared_unwritten", run_reverse<Reverse::kUnwritten>},
    {"divergent_barrier", run_reverse<Reverse::kDivergentBarrier>},
    {"lost_barrier", run_reverse<Reverse::kLostBarrier>},
    {"right_copy", run_copy<Copy::kRight>},
    {"copy_without_wait", run_copy<Copy::kNoWait>},
    {"copy_waits_for_too_few", run_copy<Copy::kWaitsForTooFew>},
    {"copy_without_barrier", run_copy<Copy::kNoBarrier>},
    {"copy_reuses_early", run_copy<Copy::kEarlyReuse>},
    {"right_warp", run_warp<Warp::kRight>},
    {"right_warp_halves", run_warp<Warp::kHalves>},
    {"divergent_shuffle", run_warp<Warp::kDivergent>},
    {"lane_not_in_mask", run_warp<Warp::kNotInMask>},
    {"mma_after_return", run_warp<Warp::kReturned>},
    {"missing_syncwarp", run_warp<Warp::kNoSyncwarp>},
    {"right_atomics", [] { return run_count<true>(4, kThreads); }},
    {"race_between_warps", [] { return run_count<false>(1, kThreads); }},
    {"race_between_blocks", [] { return run_count<false>(4, 32); }},
    {"right_vectors", run_vectors<0, false>},
    {"right_raw_vectors", run_vectors<0, true>},
    {"misaligned_load", run_vectors<1, false>},
    {"misaligned_raw_load", run_vectors<1, true>},
    {"right_ldmatrix", run_ldmatrix<0>},
    {"ldmatrix_misaligned", run_ldmatrix<1>},
    {"ldmatrix_outside", run_ldmatrix<4>},
    {"empty_grid", [] { return run_launch({1, 0}, 32, 0); }},
    {"large_grid", [] { return run_launch({1, 65536}, 32, 0); }},
    {"large_block", [] { return run_launch(1, {32, 33}, 0); }},
    {"large_smem", [] { return run_launch(1, 32, 99 * 1024 + 1); }},
    {"right_launch", [] { return run_launch({2, 3, 4}, {1, 1, 64}, 99 * 1024); }},
};

}  // namespace planted

int main(int argc, char** argv) {
  for (const planted::Case& c : planted::kCases) {
    if (argc != 2 || std::strcmp(argv[1], c.name) != 0) continue;
    try {
      if (c.run()) return 0;
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 2;
    }
    std::fprintf(stderr, "wrong result\n");
    return 3;
  }
  for (const planted::Case& c : planted::kCases) std::puts(c.name);
  return argc == 1 ? 0 : 1;
}
