// Causal depthwise convolution: single-threaded, compiled per ISA level. Channels are the lanes, so
// that neighbouring tokens are neighbouring rows.
#include "gdn/cpu/conv1d.h"
#include "gdn/cpu/tokens.h"

namespace kvcore::gdn::KVCORE_ISA {
namespace {

struct Range {
  int64_t batch, begin, end;  // tokens of one sequence
};

Range range_of(const Sequences& s, int64_t num_tokens, int64_t idx) {
  if (s.cu_seqlens == nullptr) return {idx, 0, num_tokens};
  return {0, s.cu_seqlens[idx], s.cu_seqlens[idx + 1]};
}

/// Tokens [first, first + count) of n channels as rows; tokens outside of `range` are zero. Lanes
/// past n are zero too.
void load_tile(const InputView& view, const Range& range, int64_t first, int count, int n,
               float* rows) {
  int64_t begin = first, end = first + count;
  if (begin < range.begin) begin = range.begin;
  if (end > range.end) end = range.end;
  for (int i = 0; i < count; ++i) {
    float* const row = rows + i * kConvChannels;
    const bool inside = first + i >= begin && first + i < end;
    if (!inside || n < kConvChannels) zero_row(row, kConvChannels);
    if (inside && view.channel_stride == 1) widen_row(view, range.batch, 0, first + i, n, row);
  }
  if (view.channel_stride == 1 || begin >= end) return;
  // Tokens are closer together than channels: rows of tokens, turned here.
  InputView turned = view;
  turned.channel_stride = view.token_stride;
  turned.token_stride = view.channel_stride;
  const InputView from = channels_from(turned, begin);
  alignas(64) float tokens[kConvTokens + kMaxConvWidth - 1];
  for (int c = 0; c < n; ++c) {
    widen_row(from, range.batch, 0, c, static_cast<int>(end - begin), tokens);
    for (int64_t i = begin; i < end; ++i) {
      rows[(i - first) * kConvChannels + c] = tokens[i - begin];
    }
  }
}

void load_taps(const InputView& weight, const InputView& bias, int width, int n, ConvWorkspace& w) {
  for (int j = 0; j < width; ++j) {
    zero_row(w.weight + j * kConvChannels, kConvChannels);
    widen_row(weight, 0, 0, j, n, w.weight + j * kConvChannels);
  }
  zero_row(w.bias, kConvChannels);
  if (bias.data != nullptr) widen_row(bias, 0, 0, 0, n, w.bias);
}

F32 sigmoid(F32 x) { return splat(1.0f) / (splat(1.0f) + exp_any(splat(0.0f) - x)); }

/// bias + sum of taps; `row` is the oldest token's.
F32 tap_sum(const ConvWorkspace& w, const float* row, int width, int c) {
  F32 z = load(w.bias + c);
  for (int j = 0; j < width; ++j) {
    z = fma(load(w.weight + j * kConvChannels + c), load(row + j * kConvChannels + c), z);
  }
  return z;
}

/// y of `count` tokens whose rows begin at w.x.
void convolve(ConvWorkspace& w, int count, int width, int n, bool silu) {
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < n; c += kLanes) {
      const F32 z = tap_sum(w, w.x + i * kConvChannels, width, c);
      store(w.y + i * kConvChannels + c, silu ? z * sigmoid(z) : z);
    }
  }
}

}  // namespace

void conv1d_kernel(const Conv1DParams& p, int64_t seq_idx, int64_t begin, int64_t end,
                   ConvWorkspace& w) {
  const int n = static_cast<int>(end - begin), width = static_cast<int>(p.width);
  const InputView x = channels_from(p.x, begin);
  InputView bias = p.bias;
  if (bias.data != nullptr) bias = channels_from(bias, begin);
  load_taps(channels_from(p.weight, begin), bias, width, n, w);
  const Range range = range_of(p.sequences, p.num_tokens, seq_idx);
  for (int64_t first = range.begin; first < range.end; first += kConvTokens) {
    const int64_t left = range.end - first;
    const int count = static_cast<int>(left < kConvTokens ? left : kConvTokens);
    load_tile(x, range, first - (width - 1), count + width - 1, n, w.x);
    convolve(w, count, width, n, p.silu);
    for (int i = 0; i < count; ++i) {
      const int64_t token = range.batch * p.num_tokens + first + i;
      narrow_row(w.y + i * kConvChannels, n, p.out, token * p.channels + begin);
    }
  }
}

void conv1d_backward_kernel(const Conv1DBackwardParams& p, int64_t begin, int64_t end,
                            ConvWorkspace& w) {
  const int n = static_cast<int>(end - begin), width = static_cast<int>(p.width);
  const InputView x = channels_from(p.x, begin), d_out = channels_from(p.d_out, begin);
  InputView bias = p.bias;
  if (bias.data != nullptr) bias = channels_from(bias, begin);
  load_taps(channels_from(p.weight, begin), bias, width, n, w);
  for (int j = 0; j < width; ++j) zero_row(w.dweight + j * kConvChannels, kConvChannels);
  zero_row(w.dbias, kConvChannels);
  for (int64_t seq = 0; seq < p.sequences.num_seqs; ++seq) {
    const Range range = range_of(p.sequences, p.num_tokens, seq);
    // Row i of dz is token first + i; of x, token first - (width - 1) + i. The tile's last
    // width - 1 rows of dz belong to the next tile, and are only needed for dx here.
    for (int64_t first = range.begin; first < range.end; first += kConvTokens - kMaxConvWidth) {
      const int64_t left = range.end - first;
      constexpr int kStep = kConvTokens - kMaxConvWidth;
      const int count = static_cast<int>(left < kStep ? left : kStep);
      const int ahead = count + width - 1;
      load_tile(d_out, range, first, ahead, n, w.dz);
      load_tile(x, range, first - (width - 1), ahead + width - 1, n, w.x);
      for (int i = 0; i < ahead; ++i) {
        for (int c = 0; c < n; c += kLanes) {
          float* const dz = w.dz + i * kConvChannels + c;
          if (p.silu) {
            const F32 z = tap_sum(w, w.x + i * kConvChannels, width, c), s = sigmoid(z);
            store(dz, load(dz) * s * (splat(1.0f) + z * (splat(1.0f) - s)));
          }
          if (i >= count) continue;
          store(w.dbias + c, load(w.dbias + c) + load(dz));
          for (int j = 0; j < width; ++j) {
            float* const dw = w.dweight + j * kConvChannels + c;
            store(dw, fma(load(dz), load(w.x + (i + j) * kConvChannels + c), load(dw)));
          }
        }
      }
      for (int i = 0; i < count; ++i) {
        for (int c = 0; c < n; c += kLanes) {
          F32 sum = splat(0.0f);
          for (int j = 0; j < width; ++j) {
            const float* const dz = w.dz + (i + width - 1 - j) * kConvChannels + c;
            sum = fma(load(w.weight + j * kConvChannels + c), load(dz), sum);
          }
          store(w.y + i * kConvChannels + c, sum);
        }
        const int64_t token = range.batch * p.num_tokens + first + i;
        narrow_row(w.y + i * kConvChannels, n, p.dx, token * p.channels + begin);
      }
    }
  }
  for (int c = 0; c < n; ++c) {
    p.dbias[begin + c] = w.dbias[c];
    for (int j = 0; j < width; ++j) {
      p.dweight[(begin + c) * width + j] = w.dweight[j * kConvChannels + c];
    }
  }
}

void conv1d_update_kernel(const Conv1DUpdateParams& p, int64_t batch, int64_t begin, int64_t end,
                          ConvWorkspace& w) {
  const int n = static_cast<int>(end - begin), width = static_cast<int>(p.width);
  const int64_t slot = p.state_indices ? p.state_indices[batch] : batch;
  const int64_t out = batch * p.num_tokens * p.channels + begin;
  if (slot < 0) {
    zero_row(w.y, kConvChannels);
    for (int64_t i = 0; i < p.num_tokens; ++i) narrow_row(w.y, n, p.out, out + i * p.channels);
    return;
  }
  InputView bias = p.bias;
  if (bias.data != nullptr) bias = channels_from(bias, begin);
  load_taps(channels_from(p.weight, begin), bias, width, n, w);
  const InputView state = {.data = p.conv_state.data,
                           .dtype = p.conv_state.dtype,
                           .batch_stride = p.channels * p.state_len,
                           .head_stride = 0,
                           .token_stride = 1,
                           .channel_stride = p.state_len};
  const InputView old_state = channels_from(state, begin), x = channels_from(p.x, begin);
  const Range past = {slot, 0, p.state_len}, now = {batch, 0, p.num_tokens};
  for (int64_t first = 0; first < p.num_tokens; first += kConvTokens) {
    const int64_t left = p.num_tokens - first;
    const int count = static_cast<int>(left < kConvTokens ? left : kConvTokens);
    load_tile(x, now, first - (width - 1), count + width - 1, n, w.x);
    if (first == 0) load_tile(old_state, past, p.state_len - (width - 1), width - 1, n, w.x);
    convolve(w, count, width, n, p.silu);
    for (int i = 0; i < count; ++i) {
      narrow_row(w.y + i * kConvChannels, n, p.out, out + (first + i) * p.channels);
    }
  }
  for (int c = 0; c < n; ++c) {
    const int64_t row = (slot * p.channels + begin + c) * p.state_len;
    for (int64_t i = 0; i < p.state_len; ++i) {
      const int64_t from = i + p.num_tokens;  // of state and tokens together
      float value;
      if (from < p.state_len) {
        widen_row(channels_from(old_state, c), slot, 0, from, 1, &value);
      } else {
        widen_row(channels_from(x, c), batch, 0, from - p.state_len, 1, &value);
      }
      narrow_row(&value, 1, p.conv_state, row + i);
    }
  }
}

}  // namespace kvcore::gdn::KVCORE_ISA
