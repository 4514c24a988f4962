// The software model of AMX tiles against loops over matrices; arguments: a fault to provoke, bf16.
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

float bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}
uint16_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// The same of bf16 pairs. Values are of 8 bits between 2^-7 and 2^8: in double, every sum is exact
// before it is rounded to fp32.
bool bf16_product_is_right(int rows, int pairs, int columns) {
  uint16_t a[16][32], b[16][32];
  float sum[16][20], expected[16][20];
  const auto draw = [](uint16_t& x) {
    x = static_cast<uint16_t>((rand() & 0x83ff) | (rand() % 2 ? 0x3c00 : 0x4000));
  };
  for (auto& row : a) {
    for (auto& x : row) draw(x);
  }
  for (auto& row : b) {
    for (auto& x : row) draw(x);
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 20; ++n)
      sum[m][n] = expected[m][n] = static_cast<float>(rand() % 999 - 499);
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float halves[2] = {0, 0};
      for (int k = 0; k < 2 * pairs; ++k) {
        const double product = double{bf16(a[m][k])} * bf16(b[k / 2][2 * n + k % 2]);
        halves[k % 2] = static_cast<float>(halves[k % 2] + product);
      }
      expected[m][n] += halves[0] + halves[1];
    }
  }
  tile_config(shapes(rows, 4 * pairs, columns));
  tile_load<0>(sum, sizeof sum[0]);
  tile_load<1>(a, sizeof a[0]);
  tile_load<2>(b, sizeof b[0]);
  tile_dot_bf16<0, 1, 2>();
  tile_store<0>(sum, sizeof sum[0]);
  tile_release();
  return memcmp(sum, expected, sizeof sum) == 0;
}

// One pair times one pair, added to sum.
float bf16_dot(float a0, float a1, float b0, float b1, float sum) {
  const uint16_t a[2] = {bits_of(a0), bits_of(a1)}, b[2] = {bits_of(b0), bits_of(b1)};
  tile_config(shapes(1, 4, 1));
  tile_load<0>(&sum, 4);
  tile_load<1>(a, 4);
  tile_load<2>(b, 4);
  tile_dot_bf16<0, 1, 2>();
  tile_store<0>(&sum, 4);
  tile_release();
  return sum;
}

bool bf16_edges_are_right() {
  const float inf = __builtin_inff(), denormal = 0x1p-130f;
  const auto is_nan = [](float x) { return x != x; };
  return bf16_dot(0x1p24f, 1, 1, 1, -0x1p24f) == 0 &&  // the pair is summed before it is added
         bf16_dot(denormal, 0, 0x1p20f, 0, 1) == 1 &&  // taken for 0: else 2^-110
         bf16_dot(denormal, 0, 0x1p20f, 0, 0) == 0 &&
         bf16_dot(0x1p-70f, 0, 0x1p-60f, 0, 0) == 0 &&       // becomes 0
         bf16_dot(0x1p-126f, 0, 1, 0, 0) == 0x1p-126f &&     // the least that does not
         bf16_dot(0, 0, 0, 0, denormal) == 0 &&              // a denormal sum too
         bf16_dot(1, 1, 0x1p-126f, -0x1.8p-126f, 0) == 0 &&  // and the sum of a pair
         bf16_dot(inf, 0, 1, 0, 0) == inf && is_nan(bf16_dot(inf, 0, 0, 0, 0)) &&
         is_nan(bf16_dot(inf, -inf, 1, 1, 0)) && is_nan(bf16_dot(0, 0, 0, 0, __builtin_nanf("")));
}

void provoke(const char* fault, bool bf16) {
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
  if (bf16) return tile_dot_bf16<0, 1, 2>();
  tile_dot<0, 1, 2>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    provoke(argv[1], argc > 2);
    return 0;
  }
  for (int rows = 1; rows <= 16; ++rows) {
    for (int inner = 4; inner <= 64; inner += 4) {
      for (const int columns : {1, 7, 16}) {
        if (!product_is_right(rows, inner, columns) ||
            !bf16_product_is_right(rows, inner / 4, columns)) {
          printf("wrong: %d rows, %d deep, %d columns\n", rows, inner, columns);
          return 1;
        }
      }
    }
  }
  if (!bf16_edges_are_right()) {
    printf("wrong: denormals, order or infinities of bf16 products\n");
    return 1;
  }
}
