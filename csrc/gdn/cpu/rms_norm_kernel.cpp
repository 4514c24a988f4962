// RMSNorm: single-threaded, compiled per ISA level. Channels are the lanes. A row is read twice,
// the second time from the first-level cache.
#include "gdn/cpu/rms_norm.h"

#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

/// The vector at p, of whose lanes n are left in the row; the others are 0.
template <class T>
inline F32 load_left(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
template <class T>
inline void store_left(T* p, F32 x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
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
float sum_of_squares(const T* x, int64_t n) {
  F32 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
    unroll<4>([&](int i) {
      const F32 v = load(x + c + i * kLanes);
      sums[i] = fma(v, v, sums[i]);
    });
  }
  for (; c < n; c += kLanes) {
    const F32 v = load_left(x + c, n - c);
    sums[0] = fma(v, v, sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, bool kGated>
void norm_rows(const RmsNormParams& p, const float* weight, int64_t begin, int64_t end) {
  const int64_t n = p.sizes.channels;
  Row at(p.sizes, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    const T* const x = at.of<T>(p.x);
    const T* const gate = kGated ? at.of<T>(p.gate) : nullptr;
    T* const out = static_cast<T*>(p.out.data) + row * n;
    const float rstd = 1.0f / sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + p.eps);
    p.rstd[row] = rstd;
    for (int64_t c = 0; c < n; c += kLanes) {
      F32 y = load_left(x + c, n - c) * splat(rstd) * load(weight + c);
      if (kGated) {
        const F32 g = load_left(gate + c, n - c);
        y = y * (g * sigmoid(g));
      }
      store_left(out + c, y, n - c);
    }
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
    const F32 rstd = splat(p.rstd[row]);
    F32 sum = splat(0.0f);
    for (int64_t c = 0; c < n; c += kLanes) {
      const F32 normed = load_left(x + c, n - c) * rstd, w = load(weight + c);
      F32 d = load_left(d_out + c, n - c);
      if (kGated) {
        const F32 g = load_left(gate + c, n - c), s = sigmoid(g), silu = g * s;
        // The derivative of silu: s + g s (1 - s).
        const F32 slope = fma(silu, splat(1.0f) - s, s);
        store_left(static_cast<T*>(p.dgate.data) + row * n + c, d * (normed * w) * slope, n - c);
        d = d * silu;
      }
      store(dweight + c, fma(d, normed, load(dweight + c)));
      const F32 dn = d * w;
      store(d_normed + c, dn);
      sum = fma(dn, normed, sum);
    }
    const F32 mean = splat(reduce_add(sum) / static_cast<float>(n));
    T* const dx = static_cast<T*>(p.dx.data) + row * n;
    for (int64_t c = 0; c < n; c += kLanes) {
      const F32 normed = load_left(x + c, n - c) * rstd;
      store_left(dx + c, rstd * (load(d_normed + c) - normed * mean), n - c);
    }
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
