// 4-bit linear layers on inputs rounded to 8 bits.
//
// y = sum over input groups of scale * input scale * (sum of x * code - zero * sum of x), the inner sums in integers.
#pragma once

#include "int4_weights.h"
#include "int8_inputs.h"

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define SPECDEC_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// y [R, 64] = R rows of x times a block; V vectors of columns at a time, as many as the registers hold.
template <int R, int V, typename S>
void multiply(const Int8Inputs& x, int64_t row, const Block<S>& block, float* y) {
  const int64_t depth = x.group / WORD, parts = block.group / x.group;  // words of an input group
  const int8_t* values = x.values + row * x.depth;
  const float* scales = x.scales + row * x.groups;
  const int32_t* totals = x.sums + row * x.groups;
  Vec y_sums[R][VECTORS] = {};
  for (int64_t g = 0; g < x.groups; ++g)
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n += V) {
      IntVec sums[R][V];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sums[r][i] = splat(block.offset ? 0 : -SYMMETRIC_ZERO * totals[r * x.groups + g]);
      for (int64_t k = g * depth; k < (g + 1) * depth; ++k) {
        for (int i = 0; i < V; ++i) {
          IntVec word;
          std::memcpy(&word, block.words + k * COLUMNS + (n + i) * LANES, sizeof(word));
          const IntVec even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
          for (int r = 0; r < R; ++r) {
            int32_t bytes[2];
            std::memcpy(bytes, values + r * x.depth + k * WORD, sizeof(bytes));
            sums[r][i] = add_byte_products(sums[r][i], even, splat(bytes[0]));
            sums[r][i] = add_byte_products(sums[r][i], odd, splat(bytes[1]));
          }
        }
      }
      for (int i = 0; i < V; ++i) {
        const int64_t at = (n + i) * LANES;
        const Vec scale = block.scale_of(g / parts, at);
        for (int r = 0; r < R; ++r) {
          Vec value = __builtin_convertvector(sums[r][i], Vec);
          if (block.offset)  // whole numbers below 2^24
            value -= block.zero_of(g / parts, at) * static_cast<float>(totals[r * x.groups + g]);
          y_sums[r][n + i] += value * (scale * scales[r * x.groups + g]);
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < VECTORS; ++i) store(y + r * COLUMNS + i * LANES, y_sums[r][i]);
}

#ifdef SPECDEC_TILES
constexpr int64_t FEWEST_TILE_ROWS = 7;  // fewer are faster without tiles, at 4096 x 4096 and at 512 x 256

// Whether Linux lets this process use AMX's registers.
inline bool may_use_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return may;
}

// y [rows, 64] = x times a block, with the bits of multiply, for input groups of 64: a product of tiles is a group's.
template <typename S>
void multiply_tiles(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
  constexpr int64_t PANEL = 64;  // rows whose results stay in the first cache
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Shapes shapes;
  IntVec codes[VECTORS][TILE_ROWS], sums[VECTORS][TILE_ROWS];  // of columns n * 16 … n * 16 + 15
  const int64_t parts = block.group / x.group, words = x.group / WORD;
  _tile_loadconfig(&shapes);
  std::fill(y, y + rows * COLUMNS, 0.0f);
  for (int64_t panel = 0; panel < rows; panel += PANEL)
    for (int64_t g = 0; g < x.groups; ++g) {
      const __m512i zero = _mm512_set1_epi8(block.offset ? 0 : SYMMETRIC_ZERO);
      for (int64_t k = 0; k < words; ++k)
        for (int64_t n = 0; n < VECTORS; ++n) {
          IntVec word;
          std::memcpy(&word, block.words + (g * words + k) * COLUMNS + n * LANES, sizeof(word));
          codes[n][2 * k] = (IntVec)_mm512_sub_epi8((__m512i)(word & 0x0f0f0f0f), zero);
          codes[n][2 * k + 1] = (IntVec)_mm512_sub_epi8((__m512i)(word >> 4 & 0x0f0f0f0f), zero);
        }
      Vec scale[VECTORS], zeros[VECTORS];
      for (int64_t n = 0; n < VECTORS; ++n) {
        scale[n] = block.scale_of(g / parts, n * LANES);
        zeros[n] = block.zero_of(g / parts, n * LANES);
      }
      for (int64_t row = panel; row < std::min(rows, panel + PANEL); row += TILE_ROWS) {
        const int8_t* values = x.values + row * x.depth + g * x.group;
        asm volatile("" ::"r"(codes) : "memory");  // GCC 12 does not know that tiles are loaded from memory
        _tile_loadd(4, values, x.depth);
        _tile_loadd(5, codes[0], 64);
        _tile_loadd(6, codes[1], 64);
        _tile_loadd(7, codes[2], 64);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(5, codes[3], 64);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 4, 5);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int64_t r = 0; r < std::min(TILE_ROWS, rows - row); ++r) {
          const int64_t group = (row + r) * x.groups + g;
          for (int64_t n = 0; n < VECTORS; ++n) {
            float* at = y + (row + r) * COLUMNS + n * LANES;
            Vec value = __builtin_convertvector(sums[n][r], Vec);
            if (block.offset) value -= zeros[n] * static_cast<float>(x.sums[group]);
            store(at, load(at) + value * (scale[n] * x.scales[group]));
          }
        }
      }
    }
  _tile_release();
}
#endif

// y [rows, 64] = x times a block
template <typename S>
void multiply_block(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
#ifdef SPECDEC_TILES
  if (rows >= FEWEST_TILE_ROWS && x.group == 64 && may_use_tiles()) return multiply_tiles(x, rows, block, y);
#endif
  int64_t row = 0;
  for (; rows - row >= 8; row += 8) multiply<8, 2>(x, row, block, y + row * COLUMNS);
  y += row * COLUMNS;
  switch (rows - row) {
    case 1: multiply<1, 4>(x, row, block, y); break;
    case 2: multiply<2, 4>(x, row, block, y); break;
    case 3: multiply<3, 4>(x, row, block, y); break;
    case 4: multiply<4, 4>(x, row, block, y); break;
    case 5: multiply<5, 4>(x, row, block, y); break;
    case 6: multiply<6, 4>(x, row, block, y); break;
    case 7: multiply<7, 4>(x, row, block, y); break;
  }
}

}  // namespace
