// 4-bit linear layers on inputs rounded to 8 bits.
//
// y = sum over input groups of scale * input scale * (sum of x * code - zero * sum of x), the inner sums in integers.
#pragma once

#include "int4_weights.h"
#include "int8_inputs.h"

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

// y [rows, 64] = x times a block
template <typename S>
void multiply_block(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
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
