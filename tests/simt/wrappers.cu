// Every wrapper of core/cuda on fixed inputs: one source for a GPU (nvcc) and for the shim (host
// compiler). What a GPU computes must be what the shim does.
//
//   wrappers [FOLDER]   prints `exact NAME HASH` for results that agree bit for bit (NaN has one
//                       form), and `bound NAME ok|FAIL WORST` for approximations, whose error
//                       is compared with what the instruction promises; FOLDER gets the results
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/convert.cuh"
#include "core/cuda/copy.cuh"
#include "core/cuda/error_flags.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/online_softmax.cuh"
#include "core/cuda/packed.cuh"
#include "core/cuda/reduce.cuh"

#ifdef __CUDACC__
namespace kvcore {
void* current_stream_handle() { return nullptr; }
}  // namespace kvcore
#endif

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

uint32_t next_random(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state ^ state >> 16;
}

std::vector<uint32_t> zeros(size_t count) { return std::vector<uint32_t>(count, 0); }

std::vector<uint32_t> random_words(size_t count, uint32_t seed) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = next_random(seed);
  return words;
}

// Floats of every exponent and sign: 2^16 patterns in steps, then the edges.
std::vector<uint32_t> float_patterns() {
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

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- Results

std::string folder;
bool failed = false;

void save(const std::string& name, const void* data, size_t bytes) {
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
void exact_floats(const std::string& name, std::vector<uint32_t> bits) {
  for (uint32_t& x : bits) {
    if ((x & 0x7fffffffu) > 0x7f800000u) x = 0x7fc00000u;
  }
  exact(name, bits);
}

// `worst` is in units of what is allowed; NaN fails.
void bound(const std::string& name, double worst) {
  const bool ok = worst <= 1;
  failed = failed || !ok;
  std::printf("bound %s %s %.3f\n", name.c_str(), ok ? "ok" : "FAIL", worst);
}

// ---- One argument, one result

template <class F>
__global__ void map_kernel(F f, const uint32_t* in, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = f(in[i], in[(i + 1) % n], in[(i + 2) % n]);
}

template <class F>
std::vector<uint32_t> map(const std::vector<uint32_t>& in, F f) {
  Buffer<uint32_t> from(in), to{zeros(in.size())};
  const int n = static_cast<int>(in.size());
  launch(map_kernel<F>, static_cast<unsigned>(n + 255) / 256, 256, 0, nullptr, f,
         static_cast<const uint32_t*>(from.data()), to.data(), n);
  return to.values();
}

// A functor of three words; x, y and z are the same as floats.
#define KVCORE_MAP(name, expression)                                               \
  struct name {                                                                    \
    __device__ uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {     \
      [[maybe_unused]] const float x = __uint_as_float(a), y = __uint_as_float(b), \
                                   z = __uint_as_float(c);                         \
      (void)b, (void)c;                                                            \
      return expression;                                                           \
    }                                                                              \
  };

__device__ inline uint32_t word(float x) { return __float_as_uint(x); }
__device__ inline uint32_t word(int x) { return static_cast<uint32_t>(x); }
__device__ inline Half half_of(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
__device__ inline BFloat16 bfloat16_of(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
// One NaN for narrow types.
__device__ inline uint32_t narrow_half(float x) {
  return x != x ? 0x7e00u : from_float<Half>(x).bits;
}
__device__ inline uint32_t narrow_bfloat16(float x) {
  return x != x ? 0x7fc0u : from_float<BFloat16>(x).bits;
}

KVCORE_MAP(HalfToFloat, word(to_float(half_of(a))))
KVCORE_MAP(BFloat16ToFloat, word(to_float(bfloat16_of(a))))
KVCORE_MAP(FloatToHalf, narrow_half(x))
KVCORE_MAP(FloatToBFloat16, narrow_bfloat16(x))
KVCORE_MAP(FloatToTf32, to_tf32(x))
KVCORE_MAP(Pack, pack_floats<Half>(x != x ? 0.0f : x, y != y ? 0.0f : y))
KVCORE_MAP(Add, word(__fadd_rn(x, y)))
KVCORE_MAP(Sub, word(__fsub_rn(x, y)))
KVCORE_MAP(Mul, word(__fmul_rn(x, y)))
KVCORE_MAP(Div, word(__fdiv_rn(x, y)))
KVCORE_MAP(Fma, word(__fmaf_rn(x, y, z)))
KVCORE_MAP(Sqrt, word(__fsqrt_rn(x)))
KVCORE_MAP(Reciprocal, word(__frcp_rn(x)))
KVCORE_MAP(ToIntNearest, word(__float2int_rn(x)))
KVCORE_MAP(ToIntZero, word(__float2int_rz(x)))
KVCORE_MAP(ToIntDown, word(__float2int_rd(x)))
KVCORE_MAP(ToIntUp, word(__float2int_ru(x)))
KVCORE_MAP(ToUintNearest, __float2uint_rn(x))
KVCORE_MAP(ToUintZero, __float2uint_rz(x))
KVCORE_MAP(FromInt, word(__int2float_rn(static_cast<int>(a))))
KVCORE_MAP(FromUint, word(__uint2float_rn(a)))
KVCORE_MAP(MaxFloat, word(fmaxf(x, y)) & ((x == 0 && y == 0) ? 0u : ~0u))
KVCORE_MAP(MinFloat, word(fminf(x, y)) & ((x == 0 && y == 0) ? 0u : ~0u))
KVCORE_MAP(RoundUp, word(ceilf(x)))
KVCORE_MAP(RoundEven, word(rintf(x)))
KVCORE_MAP(Dp4aSigned, word(__dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c))))
KVCORE_MAP(Dp4aUnsigned, __dp4a(a, b, c))
KVCORE_MAP(BytePerm, __byte_perm(a, b, c & 0x7777u))
KVCORE_MAP(Popcount, word(__popc(a)))
KVCORE_MAP(LeadingZeros, word(__clz(static_cast<int>(a))))
KVCORE_MAP(FirstSet, word(__ffs(static_cast<int>(a))))
KVCORE_MAP(MulHigh, __umulhi(a, b))
KVCORE_MAP(FunnelShift, __funnelshift_r(a, b, c))
KVCORE_MAP(Sas, word(sas(-fabsf(x), -15.0f)))
KVCORE_MAP(ExpNonpositive, word(exp_nonpositive(-fabsf(x))))
KVCORE_MAP(Exp2, word(exp2_approx(x)))
KVCORE_MAP(Log2, word(log2_approx(x)))
KVCORE_MAP(Rcp, word(rcp_approx(x)))

// NaN operands are left out: the payload of their result is not promised.
__device__ inline uint32_t without_nan(uint32_t halves) {
  for (int shift = 0; shift < 32; shift += 16) {
    if ((halves >> shift & 0x7fff) > 0x7bff) halves &= ~(0xffffu << shift);
  }
  return halves;
}
__device__ inline uint32_t one_nan(uint32_t halves) {
  for (int shift = 0; shift < 32; shift += 16) {
    if ((halves >> shift & 0x7fff) > 0x7c00)
      halves = (halves & ~(0xffffu << shift)) | 0x7e00u << shift;
  }
  return halves;
}
KVCORE_MAP(FmaHalves, one_nan(fma_f16x2(without_nan(a), without_nan(b), without_nan(c))))

void arithmetic() {
  const std::vector<uint32_t> floats = float_patterns();
  const std::vector<uint32_t> words = random_words(1 << 14, 1);
  std::vector<uint32_t> halves(1 << 16);
  for (uint32_t i = 0; i < halves.size(); ++i) halves[i] = i;
  exact_floats("half_to_float", map(halves, HalfToFloat{}));
  exact_floats("bfloat16_to_float", map(halves, BFloat16ToFloat{}));
  exact("float_to_half", map(floats, FloatToHalf{}));
  exact("float_to_bfloat16", map(floats, FloatToBFloat16{}));
  exact_floats("float_to_tf32", map(floats, FloatToTf32{}));
  exact("pack_halves", map(floats, Pack{}));
  // Random operands, and neighbouring patterns of equal exponent.
  for (const auto& [suffix, in] : {std::pair{"_random", words}, std::pair{"_patterns", floats}}) {
    const std::string end = suffix;
    exact_floats("fadd" + end, map(in, Add{}));
    exact_floats("fsub" + end, map(in, Sub{}));
    exact_floats("fmul" + end, map(in, Mul{}));
    exact_floats("fdiv" + end, map(in, Div{}));
    exact_floats("fma" + end, map(in, Fma{}));
    exact_floats("fmax" + end, map(in, MaxFloat{}));
    exact_floats("fmin" + end, map(in, MinFloat{}));
    exact("fma_halves" + end, map(in, FmaHalves{}));
  }
  exact_floats("fsqrt", map(floats, Sqrt{}));
  exact_floats("frcp", map(floats, Reciprocal{}));
  exact_floats("ceil", map(floats, RoundUp{}));
  exact_floats("rint", map(floats, RoundEven{}));
  exact("float2int_rn", map(floats, ToIntNearest{}));
  exact("float2int_rz", map(floats, ToIntZero{}));
  exact("float2int_rd", map(floats, ToIntDown{}));
  exact("float2int_ru", map(floats, ToIntUp{}));
  exact("float2uint_rn", map(floats, ToUintNearest{}));
  exact("float2uint_rz", map(floats, ToUintZero{}));
  exact("int2float", map(words, FromInt{}));
  exact("uint2float", map(words, FromUint{}));
  exact("dp4a_signed", map(words, Dp4aSigned{}));
  exact("dp4a_unsigned", map(words, Dp4aUnsigned{}));
  exact("byte_perm", map(words, BytePerm{}));
  exact("popc", map(words, Popcount{}));
  exact("clz", map(words, LeadingZeros{}));
  exact("ffs", map(words, FirstSet{}));
  exact("umulhi", map(words, MulHigh{}));
  exact("funnelshift", map(words, FunnelShift{}));
  exact_floats("sas", map(floats, Sas{}));
  exact_floats("exp_nonpositive", map(floats, ExpNonpositive{}));
}

// ---- Approximations against double

template <class F>
void approximation(const std::string& name, const std::vector<uint32_t>& in, F f,
                   double (*error)(float x, float y)) {
  const std::vector<uint32_t> out = map(in, f);
  double worst = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const double e = error(as_float(in[i]), as_float(out[i]));
    if (!(e <= worst)) worst = e;
  }
  bound(name, worst);
}

double relative(double actual, double expected) {
  if (expected == 0 || std::isinf(expected)) return actual == expected ? 0 : INFINITY;
  return std::fabs(actual - expected) / std::fabs(expected);
}

// Subnormal results may be 0; what rounding of float adds is part of the bounds.
double flushed(double y) { return std::fabs(y) < 0x1p-126 ? 0 : y; }

void approximations() {
  const std::vector<uint32_t> all = float_patterns();
  std::vector<uint32_t> floats;
  for (const uint32_t x : all) {
    const uint32_t magnitude = x & 0x7fffffffu;
    if (magnitude == 0 || (magnitude >= 0x800000u && magnitude < 0x7f800000u)) floats.push_back(x);
  }
  approximation("exp2_approx", floats, Exp2{}, [](float x, float y) {
    const double expected = flushed(std::exp2(static_cast<double>(x)));
    if (expected > 0x1.fffffep127) return std::isinf(y) ? 0.0 : 2.0;
    // At the edge of the normal numbers either side is right.
    if (expected < 0x1.00001p-126 && y == 0) return 0.0;
    return relative(y, expected) / 0x1p-22;
  });
  approximation("log2_approx", floats, Log2{}, [](float x, float y) {
    if (x < 0) return std::isnan(y) ? 0.0 : 2.0;
    const double expected = std::log2(static_cast<double>(x));
    if (x >= 0.5f && x <= 2) return std::fabs(y - expected) / 0x1p-22;
    return relative(y, expected) / 0x1p-22;
  });
  approximation("rcp_approx", floats, Rcp{}, [](float x, float y) {
    if (x == 0) return std::isinf(y) ? 0.0 : 2.0;
    const double expected = flushed(1.0 / x);
    if (std::fabs(expected) < 0x1.00001p-126 && y == 0) return 0.0;
    return relative(y, expected) / 0x1p-23;
  });
}

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

// ---- Matrices

template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* smem = reinterpret_cast<uint32_t*>(dynamic_smem());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) smem[4 * lane + i] = in[4 * lane + i];
  __syncwarp();
  // Rows in another order than that of memory.
  const uint32_t* row = smem + 4 * (lane * 5 % (8 * kMatrices));
  uint32_t r[4] = {};
  if constexpr (kMatrices == 1) kTransposed ? ldmatrix_x1_trans(r[0], row) : ldmatrix_x1(r[0], row);
  if constexpr (kMatrices == 2) {
    uint32_t two[2];
    kTransposed ? ldmatrix_x2_trans(two, row) : ldmatrix_x2(two, row);
    r[0] = two[0];
    r[1] = two[1];
  }
  if constexpr (kMatrices == 4) kTransposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* name) {
  Buffer<uint32_t> in(random_words(128, 11)), out{zeros(128)};
  launch(ldmatrix_kernel<kMatrices, kTransposed>, 1, 32, 512, nullptr,
         static_cast<const uint32_t*>(in.data()), out.data());
  exact(name, out.values());
}

enum class Mma { kS8, kF16, kBf16, kTf32 };

// Per lane: 4 words of A, 2 of B, 4 of the accumulator.
template <Mma kType>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* own = in + 10 * threadIdx.x;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  if constexpr (kType == Mma::kS8) {
    int32_t d[4];
    for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(own[6 + i]);
    mma_m16n8k32_s8(d, a, b);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = static_cast<uint32_t>(d[i]);
  } else {
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);
    if constexpr (kType == Mma::kF16) mma_m16n8k16_f16(d, a, b);
    if constexpr (kType == Mma::kBf16) mma_m16n8k16_bf16(d, a, b);
    if constexpr (kType == Mma::kTf32) mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = __float_as_uint(d[i]);
  }
}

template <Mma kType>
std::vector<uint32_t> run_mma(const std::vector<uint32_t>& fragments) {
  Buffer<uint32_t> in(fragments), out{zeros(128)};
  launch(mma_kernel<kType>, 1, 32, 0, nullptr, static_cast<const uint32_t*>(in.data()), out.data());
  return out.values();
}

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The bits of a float in a format of 16 or 32 bits; x has to fit it.
template <Mma kType>
uint32_t element(float x) {
  const uint32_t bits = float_bits(x);
  if constexpr (kType == Mma::kTf32) return bits;
  if constexpr (kType == Mma::kBf16) return bits >> 16;
  if (x == 0) return 0;
  return (bits >> 16 & 0x8000u) | ((bits >> 13 & 0x3ffffu) - (112u << 10));
}

// Values with few bits, so that every sum is exact whatever its order.
template <Mma kType>
std::vector<uint32_t> float_fragments(uint32_t seed, float scale, int range) {
  const auto value = [&] {
    const int drawn = static_cast<int>(next_random(seed) % (2 * range + 1)) - range;
    return scale * static_cast<float>(drawn);
  };
  std::vector<uint32_t> words(320);
  for (size_t i = 0; i < words.size(); ++i) {
    if (i % 10 >= 6) {
      words[i] = float_bits(value());
    } else if (kType == Mma::kTf32) {
      words[i] = element<kType>(value());
    } else {
      words[i] = element<kType>(value());
      words[i] |= element<kType>(value()) << 16;
    }
  }
  return words;
}

double fragment_value(Mma type, uint32_t word, int half) {
  if (type == Mma::kTf32) return as_float(word & 0xffffe000u);
  const uint32_t bits = word >> (16 * half) & 0xffffu;
  if (type == Mma::kBf16) return as_float(bits << 16);
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double mantissa = bits & 1023u;
  if (exponent == 0) return sign * mantissa * 0x1p-24;
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// The error of a sum of K + 1 products is at most that many units of the largest partial sum's
// last place: the hardware aligns and truncates.
template <Mma kType>
void mma_bound(const char* name) {
  constexpr int kPack = kType == Mma::kTf32 ? 1 : 2, kK = 8 * kPack;
  std::vector<uint32_t> in = float_fragments<kType>(99, 0.0078125f, 120);
  const std::vector<uint32_t> out = run_mma<kType>(in);
  double worst = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = as_float(in[10 * lane + 6 + e]), size = std::fabs(sum);
      for (int k = 0; k < kK; ++k) {
        const int half = k / (kK / 2), t = k % (kK / 2) / kPack, i = k % kPack;
        const double a = fragment_value(kType, in[10 * (row % 8 * 4 + t) + row / 8 + 2 * half], i);
        const double b = fragment_value(kType, in[10 * (column * 4 + t) + 4 + half], i);
        sum += a * b;
        size += std::fabs(a * b);
      }
      const double error = std::fabs(as_float(out[4 * lane + e]) - sum);
      worst = std::max(worst, error / (size * (kK + 1) * 0x1p-23));
    }
  }
  bound(name, worst);
}

void matrices() {
  ldmatrix<1, false>("ldmatrix_x1");
  ldmatrix<2, false>("ldmatrix_x2");
  ldmatrix<4, false>("ldmatrix_x4");
  ldmatrix<1, true>("ldmatrix_x1_trans");
  ldmatrix<2, true>("ldmatrix_x2_trans");
  ldmatrix<4, true>("ldmatrix_x4_trans");
  const std::vector<uint32_t> words = random_words(320, 5);
  save("mma_s8_in", words.data(), 4 * words.size());
  exact("mma_s8", run_mma<Mma::kS8>(words));  // random accumulators: some sums wrap
  const auto halves = float_fragments<Mma::kF16>(6, 0.5f, 15);
  const auto bfloats = float_fragments<Mma::kBf16>(7, 0.5f, 15);
  const auto tf32s = float_fragments<Mma::kTf32>(8, 0.5f, 15);
  save("mma_f16_in", halves.data(), 4 * halves.size());
  save("mma_bf16_in", bfloats.data(), 4 * bfloats.size());
  save("mma_tf32_in", tf32s.data(), 4 * tf32s.size());
  exact("mma_f16", run_mma<Mma::kF16>(halves));
  exact("mma_bf16", run_mma<Mma::kBf16>(bfloats));
  exact("mma_tf32", run_mma<Mma::kTf32>(tf32s));
  mma_bound<Mma::kF16>("mma_f16_bound");
  mma_bound<Mma::kBf16>("mma_bf16_bound");
  mma_bound<Mma::kTf32>("mma_tf32_bound");
}

// ---- Warps and blocks

__global__ void collective_kernel(const uint32_t* in, uint32_t* out, uint32_t* counters,
                                  uint32_t* flags) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const uint32_t x = in[t];
  uint32_t* own = out + 24 * t;
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
  *own = blockDim.x + 1000 * gridDim.x;
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
  Buffer<uint32_t> in(random_words(128, 3)), out{zeros(24 * 128)};
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
