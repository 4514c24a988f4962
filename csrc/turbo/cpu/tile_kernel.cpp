// The tile routines of both attention ops: single-threaded, compiled per ISA level.
#include "core/cpu/rows.h"
#include "turbo/cpu/scores.h"
#include "turbo/cpu/softmax.h"
#include "turbo/cpu/tile.h"
#include "turbo/cpu/values.h"
#if defined(KVCORE_ISA_AMX)
#include "turbo/cpu/tile_amx.h"
#endif

namespace kvcore::turbo::KVCORE_ISA {
namespace {

// Rows that go through a page together. Their sums take half of the registers: 4 rows of 4 vectors
// or 8 of 2 with AVX-512, and unpacking narrow codes is done once for all of them.
constexpr int kMaxRows = kVectorRegisters == 32 ? 8 : kLanes == 8 ? 4 : 2;
constexpr int num_vecs(int num_rows) { return kVectorRegisters == 32 && num_rows <= 4 ? 4 : 2; }

float block_scale(const uint8_t* block) {
  float scale;
  memcpy(&scale, block, sizeof scale);
  return scale;
}

constexpr int kMaxRowsWithoutFetch = 4;

/// f(Bits<bits>()) for a width.
template <int kBits>
struct Bits {};
template <class F>
void with_bits(int bits, const F& f) {
  if (bits == 8) return f(Bits<8>());
  if (bits == 4) return f(Bits<4>());
  return f(Bits<2>());
}

template <int kRows>
void attend_rows(RowTile& tile, int row, const Page& page, const Page* next,
                 const Softmax& softmax) {
  PageUpdate<kRows> u;
  const int head_dim = tile.head_dim;
  with_bits(page.k_bits, [&]<int kBits>(Bits<kBits>) {
    page_scores<kBits, kRows, num_vecs(kRows)>(page.k, head_dim, tile.q8 + row * head_dim,
                                               tile.q_excess + row, next ? next->k : nullptr,
                                               next ? block_bytes(next->k_bits, head_dim) : 0, u.s);
  });
  const float k_scale = block_scale(page.k), v_scale = block_scale(page.v);
  const bool any_p =
      softmax.exact
          ? page_softmax<true>(tile, row, kRows, page, k_scale, v_scale, 0.0f, u)
          : page_softmax<false>(tile, row, kRows, page, k_scale, v_scale, softmax.sas_threshold, u);
  if (!any_p) return;
  with_bits(page.v_bits, [&]<int kBits>(Bits<kBits>) {
    page_values<kBits, kRows, num_vecs(kRows)>(page.v, head_dim, u, next ? next->v : nullptr,
                                               next ? block_bytes(next->v_bits, head_dim) : 0,
                                               tile.o + row * head_dim);
  });
}

template <int kRows = kMaxRows>
void attend_rows(int num_rows, RowTile& tile, int row, const Page& page, const Page* next,
                 const Softmax& softmax) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return attend_rows<kRows - 1>(num_rows, tile, row, page, next, softmax);
  }
  attend_rows<kRows>(tile, row, page, next, softmax);
}

float row_sum(const RowTile& tile, int row) { return reduce_add(load(tile.l + row * kMaxLanes)); }

bool sees(const RowTile& tile, int row, const Page& page) {
  return tile.first_key[row] < page.first_key + kPageTokens && tile.end_key[row] > page.first_key &&
         tile.first_key[row] < tile.end_key[row];
}

template <int kBits>
void widen_k(const uint8_t* block, int head_dim, uint8_t* codes8) {
  const uint8_t* codes = block + code_offset(kBits, head_dim);
  const uint8_t* step = block + kHeaderBytes;
  const uint8_t* zero = step + head_dim;
  for (int row = 0; row < head_dim / 8; ++row) {
    for (int part = 0; part < 2; ++part) {
      const int at = row / 4 * kChunk + row % 4 * kInterleave + part * 16;
      const Levels levels = make_levels(splat_dword(step + at), splat_dword(zero + at));
      for (int token = 0; token < kPageTokens; token += kLanes) {
        const Bytes q = load_k_codes<kBits>(codes, row, part, token);
        store_bytes(codes8 + at * kPageTokens + token * kInterleave, dequantize(q, levels));
      }
    }
  }
}

template <int kBits>
void widen_v(const uint8_t* block, int head_dim, uint8_t* codes8) {
  const uint8_t* codes = block + code_offset(kBits, head_dim);
  const uint8_t* step = block + kHeaderBytes;
  const uint8_t* zero = step + head_dim;
  const Bytes mask = splat_word(((1 << kBits) - 1) * 0x0101);
  for (int channel = 0; channel < head_dim; channel += kLanes) {
    const Levels levels = make_levels(spread_bytes(step + channel), spread_bytes(zero + channel));
    for (int row = 0; row < kPageTokens * kBits / 32; ++row) {
      Bytes x = load_bytes(codes + (row * head_dim + channel) * kInterleave);
      for (int part = 0; part < 8 / kBits; ++part) {
        const int token = row % 4 * kInterleave + row / 4 * kChunk + part * 16;
        store_bytes(codes8 + token * head_dim + channel * kInterleave,
                    dequantize(and_bytes(x, mask), levels));
        x = shift_words<kBits>(x);
      }
    }
  }
}

/// Rebuilds a 4- or 2-bit block as an 8-bit one.
void widen_block(const uint8_t* block, int kv, int bits, int head_dim, uint8_t* block8) {
  memcpy(block8, block, kHeaderBytes);
  uint8_t* codes8 = block8 + code_offset(8, head_dim);
  if (kv == 0) {
    bits == 4 ? widen_k<4>(block, head_dim, codes8) : widen_k<2>(block, head_dim, codes8);
  } else {
    bits == 4 ? widen_v<4>(block, head_dim, codes8) : widen_v<2>(block, head_dim, codes8);
  }
}

/// The page with narrow blocks replaced by copies in the tile.
Page widen(Page page, RowTile& tile) {
  if (page.k_bits != 8) {
    widen_block(page.k, 0, page.k_bits, tile.head_dim, tile.widened[0]);
    page.k = tile.widened[0];
  }
  if (page.v_bits != 8) {
    widen_block(page.v, 1, page.v_bits, tile.head_dim, tile.widened[1]);
    page.v = tile.widened[1];
  }
  page.k_bits = page.v_bits = 8;
  return page;
}

bool any_sees(const RowTile& tile, int row, int num_rows, const Page& page) {
  bool seen = false;
  for (int r = row; r < row + num_rows; ++r) seen |= sees(tile, r, page);
  return seen;
}

/// Adds a page to the rows that see it; `next` is fetched meanwhile, may be null.
void attend_page(RowTile& tile, const Page& page, const Page* next, const Softmax& softmax) {
  for (int row = 0; row < tile.num_rows;) {
    // Equal shares: 10 rows are 5 + 5, not 8 + 2.
    const int left = tile.num_rows - row;
    const int parts = (left + kMaxRows - 1) / kMaxRows;
    const int num_rows = (left + parts - 1) / parts;
    if (any_sees(tile, row, num_rows, page)) {
      attend_rows(num_rows, tile, row, page, next, softmax);
      next = nullptr;
    }
    row += num_rows;
  }
}

#if defined(KVCORE_ISA_AMX)
void attend_by_tiles(RowTile& tile, const Page& page, const Softmax& softmax) {
  const float k_scale = block_scale(page.k), v_scale = block_scale(page.v);
  for (int row = 0; row < tile.num_rows; row += kAmxRows) {
    const int left = tile.num_rows - row, num_rows = left < kAmxRows ? left : kAmxRows;
    if (!any_sees(tile, row, num_rows, page)) continue;
    num_rows > kTileMaxRows
        ? attend_tiles<true>(tile, row, num_rows, page, k_scale, v_scale, softmax)
        : attend_tiles<false>(tile, row, num_rows, page, k_scale, v_scale, softmax);
  }
}
#endif

}  // namespace

void load_tile(const TileSource& source, const Softmax& softmax, RowTile& tile) {
  const int head_dim = source.head_dim;
  tile.num_rows = source.num_rows;
  tile.head_dim = head_dim;
  memset(tile.o, 0, sizeof(float) * source.num_rows * head_dim);
  memset(tile.l, 0, sizeof(float) * source.num_rows * kMaxLanes);
  alignas(64) float x[kMaxHeadDim];
  for (int r = 0; r < source.num_rows; ++r) {
    const int64_t token = (source.first_row + r) / source.group;
    const int64_t head = source.kv_head * source.group + (source.first_row + r) % source.group;
    widen_row(source.q, source.batch_idx, head, source.first_token + token, head_dim, x);

    F32 mean_sum = splat(0.0f), top = splat(0.0f), check = splat(0.0f);
    for (int c = 0; c < head_dim; c += kLanes) {
      F32 q = load(x + c);
      if (source.k_mean) mean_sum = fma(q, load(source.k_mean + c), mean_sum);
      if (source.k_balance) q = q * load(source.k_balance + c);
      store(x + c, q);
      top = max(top, abs(q));
      check = fma(q, splat(0.0f), check);  // 0, or NaN once something is not finite
    }
    const bool finite = reduce_add(check) == 0.0f;
    float s_q = reduce_max(top) / kCodeMax;
    if (!(s_q >= 0x1p-126f)) s_q = 0x1p-126f;
    I32 code_sum = splat_i32(0);
    int8_t* q8 = tile.q8 + r * head_dim;
    for (int c = 0; c < head_dim; c += kLanes) {
      const I32 code = finite ? to_i32(load(x + c) / splat(s_q)) : splat_i32(0);
      code_sum = add_i32(code_sum, code);
      store_low_bytes(q8 + c, code);
    }
    tile.q_scale[r] = finite ? s_q * softmax.scale : 0.0f;
    tile.q_mean[r] = source.k_mean ? softmax.scale * reduce_add(mean_sum) : 0.0f;
    tile.q_excess[r] = -kSignedExcess * reduce_add_i32(code_sum);
    tile.m[r] = -__builtin_inff();

    int64_t end = source.kv_len, first = 0;
    if (softmax.causal) {
      end = token + 1 + source.kv_len - source.q_len;
      if (softmax.window > 0) first = end - softmax.window;
    }
    tile.first_key[r] = first > 0 ? first : 0;
    tile.end_key[r] = end > 0 ? end : 0;
    tile.poisoned[r] = !finite && tile.end_key[r] > 0;
  }
}

void attend_pages(RowTile& tile, const Page* pages, int64_t num_pages, const Softmax& softmax) {
  const int num_rows = tile.num_rows;
  bool widens = num_rows > kFewRows;
#if defined(KVCORE_ISA_AMX)
  const bool by_tiles = num_rows >= kMinTileRows;
  widens |= by_tiles;
  if (by_tiles) tile_config(tile_shapes(tile.head_dim));
#endif
  for (int64_t i = 0; i < num_pages; ++i) {
    const float scales = block_scale(pages[i].k) + block_scale(pages[i].v);
    if (scales != scales) {
      for (int r = 0; r < num_rows; ++r) tile.poisoned[r] |= sees(tile, r, pages[i]);
      continue;
    }
    const Page page = widens ? widen(pages[i], tile) : pages[i];
#if defined(KVCORE_ISA_AMX)
    if (by_tiles) {
      attend_by_tiles(tile, page, softmax);
      continue;
    }
#endif
    // With few rows a page takes no longer than its bytes, and the hardware's own prefetching does
    // better.
    const bool fetches = i + 1 < num_pages && num_rows > kMaxRowsWithoutFetch;
    attend_page(tile, page, fetches ? &pages[i + 1] : nullptr, softmax);
  }
#if defined(KVCORE_ISA_AMX)
  if (by_tiles) tile_release();
#endif
}

void store_tile(const RowTile& tile, const TileSource& source, const TileOutput& output) {
  const int head_dim = tile.head_dim;
  alignas(64) float row[kMaxHeadDim];
  for (int r = 0; r < tile.num_rows; ++r) {
    const int64_t token = source.first_token + (source.first_row + r) / source.group;
    const int64_t head = source.kv_head * source.group + (source.first_row + r) % source.group;
    const int64_t at = (source.batch_idx * output.q_heads + head) * output.q_tokens + token;
    const float sum = row_sum(tile, r);
    float lse = tile.m[r] + __builtin_logf(sum) + tile.q_mean[r];
    F32 divisor = splat(sum);
    if (sum == 0.0f) {  // no key: o is 0
      lse = -__builtin_inff();
      divisor = splat(1.0f);
    }
    if (tile.poisoned[r]) {
      lse = __builtin_nanf("");
      divisor = splat(lse);
    }
    for (int c = 0; c < head_dim; c += kLanes) {
      store(row + c, load(tile.o + r * head_dim + c) / divisor);
    }
    narrow_row(row, head_dim, output.out, at * head_dim);
    output.lse[at] = lse;
  }
}

void save_partial(const RowTile& tile, Partial* partials, float* o) {
  for (int r = 0; r < tile.num_rows; ++r) {
    partials[r] = {tile.m[r], row_sum(tile, r), tile.poisoned[r]};
  }
  memcpy(o, tile.o, sizeof(float) * tile.num_rows * tile.head_dim);
}

void merge_partials(const Partial* partials, const float* o, int64_t num_parts, RowTile& tile) {
  const int64_t num_rows = tile.num_rows, head_dim = tile.head_dim;
  for (int64_t r = 0; r < num_rows; ++r) {
    float m = -__builtin_inff();
    for (int64_t part = 0; part < num_parts; ++part) {
      const Partial& partial = partials[part * num_rows + r];
      if (partial.m > m) m = partial.m;
      tile.poisoned[r] |= partial.poisoned;
    }
    tile.m[r] = m;
    if (m == -__builtin_inff()) continue;  // no key: load_tile left l and o zero
    float l = 0.0f;
    float* sum = tile.o + r * head_dim;
    for (int64_t part = 0; part < num_parts; ++part) {
      const Partial& partial = partials[part * num_rows + r];
      if (partial.l == 0.0f) continue;
      const float weight = exp_nonpositive(partial.m - m);
      const float* part_o = o + (part * num_rows + r) * head_dim;
      l += weight * partial.l;
      for (int c = 0; c < head_dim; c += kLanes) {
        store(sum + c, fma(splat(weight), load(part_o + c), load(sum + c)));
      }
    }
    tile.l[r * kMaxLanes] = l;
  }
}

}  // namespace kvcore::turbo::KVCORE_ISA
