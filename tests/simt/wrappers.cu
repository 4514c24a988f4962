// Every wrapper of core/cuda on fixed inputs: one source for a GPU (nvcc) and for the shim (host
// compiler). What a GPU computes must be what the shim does.
//
//   wrappers [FOLDER]   prints `exact NAME HASH` for results that agree bit for bit (NaN has one
//                       form), and `bound NAME ok|FAIL WORST` for approximations, whose error
//                       is compared with what the instruction promises; FOLDER gets the results
#include <cstdio>
#include <exception>
#include <vector>

#include "core/cuda/copy.cuh"
#include "core/cuda/error_flags.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/scan.cuh"
#include "wrappers_math.h"
#include "wrappers_matrix.h"
#include "wrappers_support.h"

#ifdef __CUDACC__
namespace kvcore {
void* current_stream_handle() { return nullptr; }
}  // namespace kvcore
#endif

namespace wrappers {

// ---- Copies

// Each thread copies words of one size into shared memory in three groups, one of them invalid,
// and waits for them one by one.
template <int kBytes>
__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  constexpr int kWords = kBytes / 4, kThreads = 64;
  uint32_t* smem = reinterpret_cast<uint32_t*>(dynamic_smem());
  const int t = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 3; ++group) {
    const int at = (group * kThreads + t) * kWords;
    const bool valid = group != 1 || t % 3 != 0;
    if (kBytes == 16) cp_async_16(smem + at, in + at, valid);
    if (kBytes == 8) cp_async_8(smem + at, in + at, valid);
    if (kBytes == 4) cp_async_4(smem + at, in + at, valid);
    cp_async_commit();
  }
  const auto give = [&](int group) {
    for (int i = 0; i < kWords; ++i) {
      const int at = (group * kThreads + t) * kWords + i;
      out[at] = smem[at];
    }
  };
  cp_async_wait<2>();
  give(0);
  cp_async_wait<1>();
  give(1);
  cp_async_wait<0>();
  __syncthreads();
  const int other = (2 * kThreads + (t ^ 1)) * kWords;
  for (int i = 0; i < kWords; ++i) out[(2 * kThreads + t) * kWords + i] = smem[other + i];
}

__global__ void vector_kernel(const uint32_t* in, uint32_t* out) {
  const int t = static_cast<int>(threadIdx.x);
  uint4 x = load_16(in + 4 * t);
  const uint4 y = load_streaming_16(in + 4 * (63 - t));
  x.x += y.w;
  x.w -= y.x;
  store_16(out + 4 * t, x);
}

template <int kBytes>
void copy(const char* name) {
  const int words = 3 * 64 * kBytes / 4;
  Buffer<uint32_t> in(random_words(words, kBytes)), out{zeros(words)};
  launch(copy_kernel<kBytes>, 1, 64, 4 * words, nullptr, static_cast<const uint32_t*>(in.data()),
         out.data());
  exact(name, out.values());
}

void copies() {
  copy<16>("cp_async_16");
  copy<8>("cp_async_8");
  copy<4>("cp_async_4");
  Buffer<uint32_t> in(random_words(256, 7)), out{zeros(256)};
  launch(vector_kernel, 1, 64, 0, nullptr, static_cast<const uint32_t*>(in.data()), out.data());
  exact("load_store_16", out.values());
}

// ---- Warps and blocks

__global__ void collective_kernel(const uint32_t* in, uint32_t* out, uint32_t* counters,
                                  uint32_t* flags) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const uint32_t x = in[t];
  uint32_t* own = out + 26 * t;
  *own++ = __shfl_sync(kAllLanes, x, lane * 7 + 3);
  *own++ = __shfl_sync(kAllLanes, x, 5, 8);
  *own++ = __shfl_xor_sync(kAllLanes, x, 21);
  *own++ = __shfl_xor_sync(kAllLanes, x, 9, 8);
  *own++ = __shfl_up_sync(kAllLanes, x, 3);
  *own++ = __shfl_up_sync(kAllLanes, x, 3, 8);
  *own++ = __shfl_down_sync(kAllLanes, x, 3);
  *own++ = __shfl_down_sync(kAllLanes, x, 3, 8);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  *own++ = __shfl_xor_sync(half, x, 2);
  __syncwarp();
  *own++ = __ballot_sync(kAllLanes, x & 1);
  *own++ = static_cast<uint32_t>(__any_sync(kAllLanes, x % 64 == 0));
  *own++ = static_cast<uint32_t>(__all_sync(kAllLanes, x % 64 != 0));
  *own++ = static_cast<uint32_t>(__syncthreads_or(t == 77) != 0);
  *own++ = static_cast<uint32_t>(__syncthreads_or(t == 777) != 0);
  // Floats whose sums round: the order shows.
  const float f = __fmul_rn(__uint2float_rn(x), 1.1f);
  float* scratch = reinterpret_cast<float*>(dynamic_smem());
  *own++ = __float_as_uint(warp_sum(f));
  *own++ = __float_as_uint(warp_max<4>(f));
  *own++ = __float_as_uint(warp_min<8>(f));
  *own++ = __float_as_uint(block_sum<128>(f, scratch));
  *own++ = __float_as_uint(block_max<128>(f, scratch));
  *own++ =
      static_cast<uint32_t>(block_min<128>(static_cast<int>(x), reinterpret_cast<int*>(scratch)));
  *own++ = __ldg(in + (t + 1) % 128);
  *own++ = static_cast<uint32_t>(min(t, 70) + max(t, 3));
  *own++ = static_cast<uint32_t>(warpSize);
  *own++ = blockDim.x + 1000 * gridDim.x;
  int total = 0;
  *own++ = static_cast<uint32_t>(block_exclusive_sum<128>(static_cast<int>(x & 0xffff),
                                                          reinterpret_cast<int*>(scratch), total));
  *own = static_cast<uint32_t>(total);
  atomicAdd(&counters[0], x);
  atomicAdd(reinterpret_cast<int*>(&counters[1]), static_cast<int>(x));
  atomicAdd(reinterpret_cast<float*>(&counters[2]), __int2float_rn(t));
  atomicMax(&counters[3], x);
  atomicMax(reinterpret_cast<int*>(&counters[4]), static_cast<int>(x));
  atomicMin(&counters[5], x);
  atomicMin(reinterpret_cast<int*>(&counters[6]), static_cast<int>(x));
  atomicOr(&counters[7], x & 0x0f0f0f0fu);
  atomicAnd(&counters[8], x | 0xf0f0f0f0u);
  atomicInc(&counters[9], 99);
  atomicAdd(reinterpret_cast<unsigned long long*>(&counters[10]), 0x100000001ull * x);
  if (t == 5) atomicExch(&counters[12], x);
  if (t == 6) atomicCAS(&counters[13], 1u, 42u);
  if (t == 7) report_error(flags, kErrorNewLens);
}

void collectives() {
  Buffer<uint32_t> in(random_words(128, 3)), out{zeros(26 * 128)};
  std::vector<uint32_t> start(16, 0);
  start[5] = start[8] = ~0u;
  start[13] = 1;
  Buffer<uint32_t> counters(start);
  launch(collective_kernel, 1, 128, 128, current_stream(), static_cast<const uint32_t*>(in.data()),
         out.data(), counters.data(), error_flags());
  exact("collectives", out.values());
  exact("atomics", counters.values());
  exact("error_flags", std::vector<uint32_t>{take_error_flags(), take_error_flags()});
}

}  // namespace wrappers

int main(int argc, char** argv) {
  if (argc > 1) wrappers::folder = argv[1];
  try {
    const auto& device = kvcore::device_properties();
    std::fprintf(stderr, "sm_%d, %d multiprocessors, %d bytes of shared memory\n", device.arch,
                 device.sm_count, device.max_smem_bytes);
    wrappers::arithmetic();
    wrappers::approximations();
    wrappers::copies();
    wrappers::matrices();
    wrappers::collectives();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return wrappers::failed ? 1 : 0;
}
