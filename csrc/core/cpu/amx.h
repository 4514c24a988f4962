// AMX tiles: the instructions, or a software model of them. For code that is compiled at level amx.
//
// With KVCORE_AMX_MODEL each operation does what Intel's manual says (Software Developer's Manual,
// volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TILERELEASE) and stops the program
// where the instruction would fault. A build for tests: it runs the kernels' own source, tile by
// tile, on any machine with AVX-512 VNNI.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(KVCORE_AMX_MODEL)
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

#else

namespace amx_model {

struct State {
  TileConfig config;
  bool configured = false;
  uint8_t tiles[kNumTiles][kTileMaxRows][kTileMaxBytes];
};
static thread_local State state;

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
template <int kAcc, int kA, int kB>
inline void tile_dot() {
  static_assert(kAcc != kA && kAcc != kB && kA != kB, "#UD: operands must be different tiles");
  for (const int tile : {kAcc, kA, kB}) amx_model::check_tile(tile);
  amx_model::State& s = amx_model::state;
  const auto& rows = s.config.rows;
  const auto& row_bytes = s.config.row_bytes;
  for (const int tile : {kAcc, kA, kB}) {
    amx_model::check(row_bytes[tile] % 4 == 0, "#UD: a row is not of whole dwords");
  }
  amx_model::check(rows[kAcc] == rows[kA], "#UD: rows of the sum and of the first operand");
  amx_model::check(row_bytes[kAcc] == row_bytes[kB], "#UD: columns of the sum and of the second");
  amx_model::check(row_bytes[kA] / 4 == rows[kB], "#UD: columns of the first, rows of the second");
  for (int m = 0; m < rows[kAcc]; ++m) {
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

#endif

}  // namespace kvcore::KVCORE_ISA
