// AMX tiles: the instructions, or a software model of them. For code that is compiled at level amx.
//
// With KVCORE_AMX_MODEL each operation does what Intel's manual says (Software Developer's Manual,
// volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TDPBF16PS, TILERELEASE) and stops
// the program where the instruction would fault. A build for tests: it runs the kernels' own
// source, tile by tile, on any machine with AVX-512 VNNI.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(KVCORE_AMX_MODEL)
#include <math.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#endif

namespace kvcore::KVCORE_ISA {

constexpr int kNumTiles = 8;
constexpr int kTileMaxRows = 16;
constexpr int kTileMaxBytes = 64;  // of a row

/// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(KVCORE_AMX_MODEL)

// Inline assembly, since the intrinsics take the tiles' numbers as literals only. The compiler
// knows no tile registers, so nothing else can use them; the order of volatile statements is kept.

inline void tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { asm volatile("tilerelease" ::); }
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
/// Rows lie `stride` bytes apart.
template <int kTile>
inline void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
/// acc[m][n] += sum over k of the four products of signed bytes of dwords a[m][k] and b[k][n].
template <int kAcc, int kA, int kB>
inline void tile_dot() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kAcc), "i"(kA), "i"(kB));
}
/// acc[m][n] += sum over k of both products of bf16 of dwords a[m][k] and b[k][n], in fp32.
template <int kAcc, int kA, int kB>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kAcc), "i"(kA), "i"(kB));
}

#else

namespace amx_model {

struct State {
  TileConfig config;
  bool configured = false;
  uint8_t tiles[kNumTiles][kTileMaxRows][kTileMaxBytes];
};
inline thread_local State state;  // one for all who include this

[[noreturn]] inline void fault(const char* what) {
  fprintf(stderr, "AMX model: %s\n", what);
  abort();
}
inline void check(bool holds, const char* what) {
  if (!holds) fault(what);
}
inline void check_tile(int tile) {
  check(state.configured, "#UD: tiles are not configured");
  check(state.config.rows[tile] > 0, "#UD: the tile is not configured");
}

}  // namespace amx_model

inline void tile_config(const TileConfig& config) {
  using amx_model::check;
  check(config.palette == 1, "#GP: palette");
  check(config.start_row == 0, "#GP: start_row of a configuration without rows to restart at");
  for (const uint8_t byte : config.reserved) check(byte == 0, "#GP: reserved bytes");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
    check(tile < kNumTiles || (rows == 0 && row_bytes == 0), "#GP: more than 8 tiles");
    check(rows <= kTileMaxRows && row_bytes <= kTileMaxBytes, "#GP: tile too large");
    check((rows == 0) == (row_bytes == 0), "#GP: one of rows and row_bytes is zero");
  }
  amx_model::state.config = config;
  amx_model::state.configured = true;
  memset(amx_model::state.tiles, 0, sizeof amx_model::state.tiles);
}
inline void tile_release() { amx_model::state.configured = false; }
template <int kTile>
inline void tile_zero() {
  amx_model::check_tile(kTile);
  memset(amx_model::state.tiles[kTile], 0, sizeof amx_model::state.tiles[kTile]);
}
template <int kTile>
inline void tile_load(const void* rows, int64_t stride) {
  tile_zero<kTile>();  // what lies past the configured shape becomes zero
  amx_model::State& s = amx_model::state;
  for (int r = 0; r < s.config.rows[kTile]; ++r) {
    memcpy(s.tiles[kTile][r], static_cast<const uint8_t*>(rows) + r * stride,
           s.config.row_bytes[kTile]);
  }
}
template <int kTile>
inline void tile_store(void* rows, int64_t stride) {
  amx_model::check_tile(kTile);
  const amx_model::State& s = amx_model::state;
  for (int r = 0; r < s.config.rows[kTile]; ++r) {
    memcpy(static_cast<uint8_t*>(rows) + r * stride, s.tiles[kTile][r], s.config.row_bytes[kTile]);
  }
}
namespace amx_model {

/// What a product of tiles asks of their shapes.
template <int kAcc, int kA, int kB>
inline void check_product() {
  static_assert(kAcc != kA && kAcc != kB && kA != kB, "#UD: operands must be different tiles");
  for (const int tile : {kAcc, kA, kB}) check_tile(tile);
  const auto& rows = state.config.rows;
  const auto& row_bytes = state.config.row_bytes;
  for (const int tile : {kAcc, kA, kB}) {
    check(row_bytes[tile] % 4 == 0, "#UD: a row is not of whole dwords");
  }
  check(rows[kAcc] == rows[kA], "#UD: rows of the sum and of the first operand");
  check(row_bytes[kAcc] == row_bytes[kB], "#UD: columns of the sum and of the second");
  check(row_bytes[kA] / 4 == rows[kB], "#UD: columns of the first, rows of the second");
}

/// Denormals are zero, going in and coming out.
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float bf16_at(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flush(x);
}

}  // namespace amx_model

template <int kAcc, int kA, int kB>
inline void tile_dot() {
  amx_model::check_product<kAcc, kA, kB>();
  amx_model::State& s = amx_model::state;
  const auto& row_bytes = s.config.row_bytes;
  for (int m = 0; m < s.config.rows[kAcc]; ++m) {
    for (int n = 0; n < row_bytes[kAcc] / 4; ++n) {
      uint32_t sum;  // wraps around, as the instruction's
      memcpy(&sum, &s.tiles[kAcc][m][4 * n], sizeof sum);
      for (int k = 0; k < row_bytes[kA] / 4; ++k) {
        for (int byte = 0; byte < 4; ++byte) {
          const int a = static_cast<int8_t>(s.tiles[kA][m][4 * k + byte]);
          const int b = static_cast<int8_t>(s.tiles[kB][k][4 * n + byte]);
          sum += static_cast<uint32_t>(a * b);
        }
      }
      memcpy(&s.tiles[kAcc][m][4 * n], &sum, sizeof sum);
    }
  }
}

// Even and odd products are two chains of multiply-adds from zero, which meet at the end.
template <int kAcc, int kA, int kB>
inline void tile_dot_bf16() {
  using amx_model::bf16_at, amx_model::flush;
  amx_model::check_product<kAcc, kA, kB>();
  amx_model::State& s = amx_model::state;
  const auto& row_bytes = s.config.row_bytes;
  for (int m = 0; m < s.config.rows[kAcc]; ++m) {
    for (int n = 0; n < row_bytes[kAcc] / 4; ++n) {
      float sums[2] = {0.0f, 0.0f};
      for (int k = 0; k < row_bytes[kA] / 4; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float a = bf16_at(&s.tiles[kA][m][4 * k + 2 * half]);
          const float b = bf16_at(&s.tiles[kB][k][4 * n + 2 * half]);
          sums[half] = flush(fmaf(a, b, sums[half]));
        }
      }
      float acc;
      memcpy(&acc, &s.tiles[kAcc][m][4 * n], sizeof acc);
      acc = flush(flush(acc) + flush(sums[0] + sums[1]));
      memcpy(&s.tiles[kAcc][m][4 * n], &acc, sizeof acc);
    }
  }
}

#endif

}  // namespace kvcore::KVCORE_ISA
