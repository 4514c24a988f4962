// The software model of AMX tiles against loops over matrices; argument: a fault to provoke.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "core/cpu/amx.h"

using namespace kvcore::KVCORE_ISA;

namespace {

TileConfig shapes(int rows, int inner_bytes, int columns) {
  TileConfig config;
  config.rows[0] = config.rows[1] = static_cast<uint8_t>(rows);
  config.row_bytes[1] = static_cast<uint16_t>(inner_bytes);
  config.rows[2] = static_cast<uint8_t>(inner_bytes / 4);
  config.row_bytes[0] = config.row_bytes[2] = static_cast<uint16_t>(4 * columns);
  return config;
}

// sum[m][n] += sum over k of a[m][k] * b[k][n], b with four k in a dword.
bool product_is_right(int rows, int inner, int columns) {
  int8_t a[16][64], b[16][64];
  int32_t sum[16][20], expected[16][20];
  for (auto& row : a) {
    for (auto& x : row) x = static_cast<int8_t>(rand());
  }
  for (auto& row : b) {
    for (auto& x : row) x = static_cast<int8_t>(rand());
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 20; ++n) sum[m][n] = expected[m][n] = rand() - (1 << 30);
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      uint32_t x = static_cast<uint32_t>(expected[m][n]);
      for (int k = 0; k < inner; ++k) {
        x += static_cast<uint32_t>(a[m][k] * b[k / 4][4 * n + k % 4]);
      }
      memcpy(&expected[m][n], &x, 4);
    }
  }
  tile_config(shapes(rows, inner, columns));
  tile_load<0>(sum, sizeof sum[0]);
  tile_load<1>(a, sizeof a[0]);
  tile_load<2>(b, sizeof b[0]);
  tile_dot<0, 1, 2>();
  tile_store<0>(sum, sizeof sum[0]);
  tile_zero<0>();
  int32_t zeros[16][20];
  memset(zeros, 1, sizeof zeros);
  tile_store<0>(zeros, sizeof zeros[0]);
  tile_release();
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      if (zeros[m][n] != 0) return false;
    }
  }
  // Also that nothing beside the tile was written.
  return memcmp(sum, expected, sizeof sum) == 0;
}

void provoke(const char* fault) {
  uint8_t memory[16 * 64] = {};
  TileConfig config = shapes(16, 64, 16);
  if (!strcmp(fault, "not configured")) return tile_zero<0>();
  if (!strcmp(fault, "released")) {
    tile_config(config);
    tile_release();
    return tile_load<0>(memory, 64);
  }
  if (!strcmp(fault, "palette")) config.palette = 2;
  if (!strcmp(fault, "reserved")) config.reserved[3] = 1;
  if (!strcmp(fault, "rows")) config.rows[5] = 17;
  if (!strcmp(fault, "half")) config.rows[5] = 1;
  if (!strcmp(fault, "ninth")) config.rows[8] = config.row_bytes[8] = 4;
  if (!strcmp(fault, "dword")) config.row_bytes[0] = config.row_bytes[2] = 62;
  if (!strcmp(fault, "m")) config.rows[1] = 8;
  if (!strcmp(fault, "n")) config.row_bytes[2] = 32;
  if (!strcmp(fault, "k")) config.rows[2] = 8;
  tile_config(config);
  if (!strcmp(fault, "unused")) return tile_store<7>(memory, 64);
  tile_dot<0, 1, 2>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    provoke(argv[1]);
    return 0;
  }
  for (int rows = 1; rows <= 16; ++rows) {
    for (int inner = 4; inner <= 64; inner += 4) {
      for (const int columns : {1, 7, 16}) {
        if (!product_is_right(rows, inner, columns)) {
          printf("wrong: %d rows, %d deep, %d columns\n", rows, inner, columns);
          return 1;
        }
      }
    }
  }
}
