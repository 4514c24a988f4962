// Stage 2 and the packed order of codes: tiles of int8 codes (page_tile.cuh) to blocks and back.
#pragma once

#include "turbo/cuda/page_tile.cuh"

namespace kvcore::turbo {

// Lanes whose tiles are 16 tokens, 32 tokens or 4 groups of channels apart.
constexpr int kNextQuarter = 1, kNextHalf = 2, kNextGroups = 16;

/// A tile with a byte per token for a byte per channel, and back: word 4 * i + j of the result has
/// tokens 4 * i .. 4 * i + 3 of channel j.
__device__ inline CodeTile transpose(const CodeTile& in) {
  CodeTile out;
#pragma unroll
  for (int i = 0; i < kTileTokens; i += 4) {
    const uint32_t ab_low = __byte_perm(in.word[i], in.word[i + 1], 0x5140);
    const uint32_t ab_high = __byte_perm(in.word[i], in.word[i + 1], 0x7362);
    const uint32_t cd_low = __byte_perm(in.word[i + 2], in.word[i + 3], 0x5140);
    const uint32_t cd_high = __byte_perm(in.word[i + 2], in.word[i + 3], 0x7362);
    out.word[i] = __byte_perm(ab_low, cd_low, 0x5410);
    out.word[i + 1] = __byte_perm(ab_low, cd_low, 0x7632);
    out.word[i + 2] = __byte_perm(ab_high, cd_high, 0x5410);
    out.word[i + 3] = __byte_perm(ab_high, cd_high, 0x7632);
  }
  return out;
}

__device__ inline void store16(uint8_t* p, const uint32_t* words) {
  *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ inline void load16(const uint8_t* p, uint32_t* words) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  words[0] = x.x;
  words[1] = x.y;
  words[2] = x.z;
  words[3] = x.w;
}

/// The whole header, by four threads.
__device__ inline void write_header(uint8_t* block, float scale, int32_t page_idx) {
  if (threadIdx.x >= kHeaderBytes / 16) return;
  const uint32_t words[4] = {threadIdx.x == 0 ? __float_as_uint(scale) : 0,
                             threadIdx.x == 0 ? static_cast<uint32_t>(page_idx) : 0, 0, 0};
  store16(block + threadIdx.x * 16, words);
}

/// Sum of squared errors of a step over the tile's 16 codes of a channel.
__device__ inline float step_error(const float (&above_least)[kTileTokens], float step, float shift,
                                   float levels) {
  const float reciprocal = 1 / step;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    // A tie may round either way: the error has the same size.
    const float above = above_least[i] - shift;
    const float q = fminf(round_even(fmaxf(above, 0) * reciprocal), levels);
    const float error = fmaf(q, step, -above);
    sum = fmaf(error, error, sum);  // exact: below 2^24 for the whole page
  }
  return sum;
}

/// Narrow codes of the tile, one in a byte; step and zero get a byte for each channel.
__device__ inline CodeTile narrow_tile(const CodeTile& codes, int bits, uint32_t& step_word,
                                       uint32_t& zero_word) {
  const float levels = bits == 4 ? 15 : 3;
  CodeTile narrow{};
  step_word = zero_word = 0;
  // One channel at a time: 16 tokens keep the units busy, and four times as many would take the
  // registers of other warps.
#pragma unroll 1
  for (int j = 0; j < kTileChannels; ++j) {
    float code[kTileTokens];  // 2^23 + 128 + code
#pragma unroll
    for (int i = 0; i < kTileTokens; ++i) code[i] = biased_byte(codes.word[i] ^ 0x80808080u, j);
    float least = code[0], top = code[0];
#pragma unroll
    for (int i = 1; i < kTileTokens; ++i) {
      least = fminf(least, code[i]);
      top = fmaxf(top, code[i]);
    }
    least = warp_min<kTileQuarters>(least);
    top = warp_max<kTileQuarters>(top);
#pragma unroll
    for (int i = 0; i < kTileTokens; ++i) code[i] -= least;
    const float range = top - least, quotient = range / levels;
    const float nearest = rintf(quotient);
    float step = 0, shift = 0, least_error = INFINITY;
    const int num_steps = tries_short_step(bits) ? 3 : 2;
    // One at a time: they would only take more registers side by side.
#pragma unroll 1
    for (int i = 0; i < num_steps; ++i) {
      const float short_step = floorf(fmaf(nearest, kShortStepEighths, 4) / 8);
      const float other = i == 0 ? nearest : i == 1 ? ceilf(quotient) : short_step;
      const float other_step = fmaxf(other, 1);
      // Half of what the steps do not reach.
      const float other_shift = rintf(fmaxf(fmaf(-levels, other_step, range), 0) / 2);
      const float error =
          warp_sum<kTileQuarters>(step_error(code, other_step, other_shift, levels));
      const bool better = error < least_error;
      step = better ? other_step : step;
      shift = better ? other_shift : shift;
      least_error = better ? error : least_error;
    }

    const float reciprocal = 1 / step;
#pragma unroll
    for (int i = 0; i < kTileTokens; ++i) {
      // The quotient corrected by its remainder, so that what is a tie is one here.
      const float above = fmaxf(code[i] - shift, 0), near = above * reciprocal;
      const float exact = fmaf(fmaf(-near, step, above), reciprocal, near);
      const float q = fminf(exact + kRounder, levels + kRounder);
      narrow.word[i] |= (__float_as_uint(q) & 0xff) << 8 * j;
    }
    step_word |= (__float_as_uint(step + kRounder) & 0xff) << 8 * j;
    zero_word |= ((__float_as_uint(least + shift) & 0xff) ^ 0x80) << 8 * j;
  }
  return narrow;
}

/// Two lanes that share bytes, `apart` from each other, merge their words into those of both and
/// keep half each: `upper` has the bits from `shift` on, and keeps the second half.
template <int kHalf>
__device__ inline void merge(uint32_t (&words)[kTileTokens], int apart, bool upper, int shift) {
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t theirs = upper ? words[i] : words[kHalf + i];
    const uint32_t mine = upper ? words[kHalf + i] : words[i];
    const uint32_t received = __shfl_xor_sync(kAllLanes, theirs, apart);
    words[i] = upper ? received | mine << shift : mine | received << shift;
  }
}

/// Writes the codes of an 8-bit block.
__device__ inline void store_codes8(const CodeTile& codes, int kv, int head_dim, uint8_t* block) {
  const TilePlace place = tile_place();
  uint8_t* out = block + code_offset(8, head_dim);
  if (kv == 0) {
    out += k_code_position(8, place.token(), place.channel()).byte;
#pragma unroll
    for (int i = 0; i < 4; ++i) store16(out + 16 * i, codes.word + 4 * i);
  } else {
    const CodeTile by_channel = transpose(codes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store16(out + v_code_position(8, place.token() + 4 * i, place.channel(), head_dim).byte,
              by_channel.word + 4 * i);
    }
  }
}

/// Writes the codes of a 4- or 2-bit block, given one in a byte.
__device__ inline void store_narrow(const CodeTile& narrow, int kv, int bits, int head_dim,
                                    uint8_t* block) {
  const TilePlace place = tile_place();
  const CodeTile merged = kv == 0 ? narrow : transpose(narrow);
  uint32_t words[kTileTokens];
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) words[i] = merged.word[i];
  uint8_t* out = block + code_offset(bits, head_dim);
  const bool second_groups = place.group % 8 >= 4;
  const bool second_quarter = place.quarter % 2 == 1, second_half = place.quarter >= 2;
  // Where the first word that this lane keeps would lie if it were that of its tile's first byte.
  if (kv == 0) {
    merge<8>(words, kNextGroups, second_groups, bits);
    if (bits == 2) merge<4>(words, kNextHalf, second_half, 4);
    out += k_code_position(bits, place.token(), place.channel()).byte + 32 * second_groups;
    if (bits == 2) out += 16 * second_half;
  } else {
    merge<8>(words, kNextQuarter, second_quarter, bits);
    if (bits == 2) merge<4>(words, kNextHalf, second_half, 4);
    const int rows = 2 * second_quarter + (bits == 2 && second_half ? 1 : 0);
    out += v_code_position(bits, place.token(), place.channel(), head_dim).byte +
           rows * head_dim * kInterleave;
  }
  store16(out, words);
  if (bits == 4) store16(out + (kv == 0 ? 16 : head_dim * kInterleave), words + 4);
}

/// Writes a whole block of the pool; meets the lanes of each warp.
__device__ inline void store_block(const CodeTile& codes, int kv, int head_dim, float scale,
                                   const PoolBlock& block) {
  write_header(block.data, scale, 0);
  if (block.bits == 8) return store_codes8(codes, kv, head_dim, block.data);
  uint32_t step, zero;
  const CodeTile narrow = narrow_tile(codes, block.bits, step, zero);
  const TilePlace place = tile_place();
  if (place.quarter < 2) {
    uint8_t* out = block.data + kHeaderBytes + place.quarter * head_dim + place.channel();
    *reinterpret_cast<uint32_t*>(out) = place.quarter == 0 ? step : zero;
  }
  store_narrow(narrow, kv, block.bits, head_dim, block.data);
}

/// The stage-1 codes that this thread's part of a block stands for.
__device__ inline CodeTile load_block(const uint8_t* block, int kv, int bits, int head_dim) {
  const TilePlace place = tile_place();
  const uint8_t* codes = block + code_offset(bits, head_dim);
  CodeTile tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const CodePosition position =
        kv == 0 ? k_code_position(bits, place.token() + 4 * i, place.channel())
                : v_code_position(bits, place.token() + 4 * i, place.channel(), head_dim);
    load16(codes + position.byte, tile.word + 4 * i);
  }
  if (bits != 8) {
    const int shift = kv == 0 ? k_code_position(bits, place.token(), place.channel()).shift
                              : v_code_position(bits, place.token(), place.channel(), 0).shift;
    const uint32_t mask = bits == 4 ? 0x0f0f0f0fu : 0x03030303u;
#pragma unroll
    for (int i = 0; i < kTileTokens; ++i) tile.word[i] = tile.word[i] >> shift & mask;
  }
  if (kv == 1) tile = transpose(tile);
  if (bits == 8) return tile;
  const uint8_t* steps = block + kHeaderBytes + place.channel();
  const uint32_t step = *reinterpret_cast<const uint32_t*>(steps);
  const uint32_t zero = *reinterpret_cast<const uint32_t*>(steps + head_dim);
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    uint32_t code[kTileChannels];
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) {
      // Its low byte: q * step + zero modulo 2^8.
      code[j] = (tile.word[i] >> 8 * j & 0xff) * (step >> 8 * j & 0xff) + (zero >> 8 * j);
    }
    tile.word[i] = pack_bytes(code[0], code[1], code[2], code[3]);
  }
  return tile;
}

}  // namespace kvcore::turbo
