#include "turbo/cpu/codes.h"
#include "turbo/cpu/stage1.h"
#include "turbo/cpu/store_access.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::KVCORE_ISA {
namespace {

// Positions [begin, end) of the sequence as fp32 rows.
Magnitude load_positions(const AppendParams& p, const AppendRange& range, int kv, int64_t head_idx,
                         int64_t begin, int64_t end, float* rows) {
  const Store& s = p.store;
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t head = (range.batch_idx * s.kv_heads + head_idx) * head_dim;
  const Calibration& c = p.calibration;
  return load_rows(kv == 0 ? p.k : p.v, kv == 0 && c.k_mean != nullptr ? c.k_mean + head : nullptr,
                   kv == 0 && c.k_balance != nullptr ? c.k_balance + head : nullptr,
                   range.batch_idx, head_idx, range.padding + begin - range.begin, end - begin,
                   head_dim, rows);
}

void flush(const AppendParams& p, int64_t batch_idx, int kv, int64_t head_idx, int64_t page_idx,
           const int8_t* codes, float scale) {
  const PoolBlock block = pool_block(p.store, batch_idx, kv, head_idx, page_idx);
  pack_block(codes, kv, block.bits, static_cast<int>(p.store.head_dim), scale, 0, block.data);
}

F32 clamp(F32 x, float bound) {
  const F32 low = splat(-bound);
  return max(low, splat(0) - max(low, splat(0) - x));
}

// Codes of one token under a scale that is already fixed; returns how many were clamped.
int64_t buffer_row(const float* x, int head_dim, float scale, int8_t* codes) {
  F32 clamped = splat(0);
  for (int c = 0; c < head_dim; c += kLanes) {
    const F32 v = load(x + c);
    const F32 finite = select(less(abs(v), splat(__builtin_inff())), v, splat(0));
    // Bounded before it is rounded, which takes no huge value; 120 is clamped as they would be.
    const F32 rounded = round_even(clamp(finite / splat(scale), kCodeMax + 1));
    clamped = clamped + select(less(splat(kCodeMax), abs(rounded)), splat(1), splat(0));
    store_low_bytes(codes + c, to_i32(clamp(rounded, kCodeMax)));
  }
  return static_cast<int64_t>(reduce_add(clamped));
}

bool all_finite(const float* x, int n) {
  for (int c = 0; c < n; ++c) {
    if (!(__builtin_fabsf(x[c]) < __builtin_inff())) return false;
  }
  return true;
}

// Codes of one token to their places in an 8-bit block.
void scatter_row(const int8_t* codes, int kv, int64_t token, int head_dim, uint8_t* block) {
  uint8_t* out = block + code_offset(8, head_dim);
  if (kv == 0) {
    for (int c = 0; c < head_dim; c += kInterleave) {
      memcpy(out + k_code_position(8, token, c).byte, codes + c, kInterleave);
    }
  } else {
    for (int c = 0; c < head_dim; ++c) {
      out[v_code_position(8, token, c, head_dim).byte] = static_cast<uint8_t>(codes[c]);
    }
  }
}

// Tokens [first, last) of a page that this call does not fill from its start.
void buffer_rows(const AppendParams& p, int64_t batch_idx, int kv, int64_t head_idx,
                 const float* rows, bool finite, int64_t first, int64_t last, uint8_t* slot) {
  const int head_dim = static_cast<int>(p.store.head_dim);
  alignas(64) int8_t codes[kMaxHeadDim];
  float scale;
  memcpy(&scale, slot + offsetof(BlockHeader, scale), sizeof scale);
  int64_t clamped = 0;
  for (int64_t t = first; t < last; ++t, rows += head_dim) {
    if (scale != scale) {
      memset(codes, 0, sizeof codes);
    } else {
      clamped += buffer_row(rows, head_dim, scale, codes);
      if (!finite && !all_finite(rows, head_dim)) scale = __builtin_nanf("");
    }
    scatter_row(codes, kv, t, head_dim, slot);
  }
  memcpy(slot + offsetof(BlockHeader, scale), &scale, sizeof scale);
  p.clamp_count[lane_index(p.store, batch_idx, kv, head_idx)] += clamped;
}

}  // namespace

float append_page_kernel(const AppendParams& p, const AppendRange& range, int kv, int64_t head_idx,
                         int64_t page_idx) {
  alignas(64) float rows[kMaxCodes];
  alignas(64) int8_t codes[kMaxCodes];
  const int64_t begin = page_idx * kPageTokens;
  const Magnitude magnitude =
      load_positions(p, range, kv, head_idx, begin, begin + kPageTokens, rows);
  const int head_dim = static_cast<int>(p.store.head_dim);
  if (page_idx < range.last_page()) {
    const int64_t token_idx = range.padding + begin - range.begin + kPageTokens;
    const int64_t left = range.end - begin - kPageTokens;
    prefetch_rows(kv == 0 ? p.k : p.v, range.batch_idx, head_idx, token_idx,
                  left < kPageTokens ? left : kPageTokens, head_dim);
  }
  const float scale = quantize_rows(rows, magnitude, kPageTokens, head_dim, codes);
  flush(p, range.batch_idx, kv, head_idx, page_idx, codes, scale);
  return magnitude.amax;
}

void append_tail_kernel(const AppendParams& p, const AppendRange& range, int kv, int64_t head_idx,
                        float bulk_amax) {
  alignas(64) float rows[kMaxCodes];
  alignas(64) int8_t codes[kMaxCodes];
  const Store& s = p.store;
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t lane = lane_index(s, range.batch_idx, kv, head_idx);
  float amax = bulk_amax;
  int64_t page_idx = range.first_page();
  while (page_idx <= range.last_page()) {
    if (page_idx >= range.bulk_begin() && page_idx < range.bulk_end()) {
      page_idx = range.bulk_end();
      continue;
    }
    const int64_t page_begin = page_idx * kPageTokens, page_end = page_begin + kPageTokens;
    const int64_t begin = range.begin > page_begin ? range.begin : page_begin;
    const int64_t end = range.end < page_end ? range.end : page_end;
    uint8_t* slot = tail_block(s, range.batch_idx, kv, head_idx, page_idx);
    const Magnitude magnitude = load_positions(p, range, kv, head_idx, begin, end, rows);
    amax = magnitude.amax > amax ? magnitude.amax : amax;
    if (page_idx == range.last_page()) {
      // All new tokens are known; only this last page can be opened, with the scale they lead to.
      const float wanted = code_scale(amax) * p.tail_margin;
      if (wanted > p.tail_scale[lane]) p.tail_scale[lane] = wanted;
    }
    if (end - begin == kPageTokens) {
      const float scale = quantize_rows(rows, magnitude, kPageTokens, head_dim, codes);
      pack_block(codes, kv, 8, head_dim, scale, static_cast<int32_t>(page_idx), slot);
      flush(p, range.batch_idx, kv, head_idx, page_idx, codes, scale);
    } else {
      if (begin == page_begin) {
        memset(slot, 0, block_bytes(8, head_dim));
        write_header(slot, p.tail_scale[lane], static_cast<int32_t>(page_idx));
      }
      buffer_rows(p, range.batch_idx, kv, head_idx, rows, magnitude.finite, begin - page_begin,
                  end - page_begin, slot);
      if (end == page_end) {
        float scale;
        memcpy(&scale, slot + offsetof(BlockHeader, scale), sizeof scale);
        unpack_block(slot, kv, 8, head_dim, codes);
        flush(p, range.batch_idx, kv, head_idx, page_idx, codes, scale);
      }
    }
    ++page_idx;
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
