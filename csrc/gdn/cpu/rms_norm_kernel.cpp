// RMSNorm: single-threaded, compiled per ISA level. Channels are the lanes. A row is read twice,
// the second time from the first-level cache.
#include "gdn/cpu/rms_norm.h"

#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// How much of a vector is in the row: all of it, as the compiler knows, or the first n lanes.
struct Whole {};

template <class T>
inline F32 load_part(const T* p, Whole) {
  return load(p);
}
template <class T>
inline F32 load_part(const T* p, int64_t n) {  // the other lanes are 0
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
template <class T>
inline void store_part(T* p, F32 x, Whole) {
  store(p, x);
}
template <class T>
inline void store_part(T* p, F32 x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
}

/// Calls f(channel, part) for the vectors of a row of n channels.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) f(c, Whole{});
  if (c < n) f(c, n - c);
}

/// Rows in their order, of views of the same sizes.
struct Row {
  const NormSizes& sizes;
  int64_t batch, head, token;

  Row(const NormSizes& s, int64_t row)
      : sizes(s),
        batch(row / (s.heads * s.num_tokens)),
        head(row / s.num_tokens % s.heads),
        token(row % s.num_tokens) {}

  template <class T>
  const T* of(const InputView& view) const {
    return static_cast<const T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
           token * view.token_stride;
  }
  void next() {
    if (++token < sizes.num_tokens) return;
    token = 0;
    if (++head < sizes.heads) return;
    head = 0;
    ++batch;
  }
};

F32 sigmoid(F32 x) { return splat(1.0f) / (splat(1.0f) + exp_any(splat(0.0f) - x)); }

template <class T>
inline float sum_of_squares(const T* x, int64_t n) {
  F32 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
    unroll<4>([&](int i) {
      const F32 v = load(x + c + i * kLanes);
      sums[i] = fma(v, v, sums[i]);
    });
  }
  for_vectors(n - c, [&](int64_t left, auto part) {
    const F32 v = load_part(x + c + left, part);
    sums[0] = fma(v, v, sums[0]);
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, bool kGated>
void norm_rows(const RmsNormParams& p, const float* weight, int64_t begin, int64_t end) {
  const int64_t n = p.sizes.channels;
  const float eps = p.eps;
  Row at(p.sizes, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    const T* const x = at.of<T>(p.x);
    const T* const gate = kGated ? at.of<T>(p.gate) : nullptr;
    T* const out = static_cast<T*>(p.out.data) + row * n;
    const float rstd = 1.0f / sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps);
    p.rstd[row] = rstd;
    const F32 factor = splat(rstd);
    for_vectors(n, [=](int64_t c, auto part) {
      F32 y = load_part(x + c, part) * factor * load(weight + c);
      if (kGated) {
        const F32 g = load_part(gate + c, part);
        y = y * (g * sigmoid(g));
      }
      store_part(out + c, y, part);
    });
  }
}

/// With n = rstd x and y = n w silu(gate): dn = dy w silu(gate), dx = rstd (dn - n mean(dn n)).
template <class T, bool kGated>
void norm_backward_rows(const RmsNormBackwardParams& p, const float* weight, int64_t begin,
                        int64_t end, float* d_normed, float* dweight) {
  const int64_t n = p.sizes.channels;
  for (int64_t c = 0; c < n; c += kLanes) store(dweight + c, splat(0.0f));
  Row at(p.sizes, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    const T* const x = at.of<T>(p.x);
    const T* const d_out = at.of<T>(p.d_out);
    const T* const gate = kGated ? at.of<T>(p.gate) : nullptr;
    T* const dgate = kGated ? static_cast<T*>(p.dgate.data) + row * n : nullptr;
    T* const dx = static_cast<T*>(p.dx.data) + row * n;
    const F32 rstd = splat(p.rstd[row]);
    F32 sum = splat(0.0f);
    for_vectors(n, [=, &sum](int64_t c, auto part) {
      const F32 normed = load_part(x + c, part) * rstd, w = load(weight + c);
      F32 d = load_part(d_out + c, part);
      if (kGated) {
        const F32 g = load_part(gate + c, part), s = sigmoid(g), silu = g * s;
        // The derivative of silu: s + g s (1 - s).
        const F32 slope = fma(silu, splat(1.0f) - s, s);
        store_part(dgate + c, d * (normed * w) * slope, part);
        d = d * silu;
      }
      store(dweight + c, fma(d, normed, load(dweight + c)));
      const F32 dn = d * w;
      store(d_normed + c, dn);
      sum = fma(dn, normed, sum);
    });
    const F32 mean = splat(reduce_add(sum) / static_cast<float>(n));
    for_vectors(n, [=](int64_t c, auto part) {
      const F32 normed = load_part(x + c, part) * rstd;
      store_part(dx + c, rstd * (load(d_normed + c) - normed * mean), part);
    });
  }
}

/// f of a value of the dtype's type.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(Half{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

}  // namespace

void rms_norm_weight_kernel(const InputView& weight, int64_t channels, float offset, float* out) {
  widen_row(weight, 0, 0, 0, static_cast<int>(channels), out);
  for (int64_t c = 0; c < channels; ++c) out[c] += offset;
  for (int64_t c = channels; c < norm_row_floats(channels); ++c) out[c] = 0.0f;
}

void rms_norm_kernel(const RmsNormParams& p, const float* weight, int64_t begin, int64_t end) {
  with_type(p.x.dtype, [&](auto value) {
    using T = decltype(value);
    if (p.gate.data != nullptr) return norm_rows<T, true>(p, weight, begin, end);
    norm_rows<T, false>(p, weight, begin, end);
  });
}

void rms_norm_backward_kernel(const RmsNormBackwardParams& p, const float* weight, int64_t begin,
                              int64_t end, float* row, float* dweight) {
  with_type(p.x.dtype, [&](auto value) {
    using T = decltype(value);
    if (p.gate.data != nullptr) {
      return norm_backward_rows<T, true>(p, weight, begin, end, row, dweight);
    }
    norm_backward_rows<T, false>(p, weight, begin, end, row, dweight);
  });
}

void rms_norm_sum_kernel(const float* partial, int64_t num_blocks, int64_t row_floats,
                         int64_t begin, int64_t end, float* dweight) {
  for (int64_t c = begin; c < end; ++c) dweight[c] = 0.0f;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const float* const row = partial + block * row_floats;
    for (int64_t c = begin; c < end; ++c) dweight[c] += row[c];
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
