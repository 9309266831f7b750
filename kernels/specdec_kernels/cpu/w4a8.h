// 4-bit linear layers on inputs rounded to 8 bits.
//
// y = sum over input groups of scale * input scale * (sum of x * code - zero * sum of x), the inner sums in integers.
#pragma once

#include "int4_weights.h"
#include "tiles.h"

namespace {

constexpr int64_t PREFETCHED = 16 * COLUMNS;  // words ahead, 4 KB: the processor's own prefetch is too near

constexpr int WORDS = SUMS_PAIRS ? MOST_CODES / 2 : 1;  // of a column whose products are summed together

// sums += the products of COUNT words of V vectors of columns and R rows of values, `stride` apart.
template <int COUNT, int R, int V>
[[gnu::always_inline]] inline void add_words(const int32_t* words, const int8_t* values, int64_t stride,
    IntVec (&sums)[R][V]) {
  IntVec products[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) products[r][i] = SUMS_PAIRS ? IntVec{} : sums[r][i];
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      IntVec word;
      std::memcpy(&word, words + k * COLUMNS + i * LANES, sizeof(word));
      if (V == 1 || i * LANES % 16 == 0)  // once a line of the caches
        __builtin_prefetch(words + k * COLUMNS + i * LANES + PREFETCHED);
      const IntVec even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* at = values + r * stride + k * WORD;
        products[r][i] = add_code_products(products[r][i], even, splat_word(at));
        products[r][i] = add_code_products(products[r][i], odd, splat_word(at + WORD / 2));
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sums[r][i] = SUMS_PAIRS ? add_pairs(sums[r][i], products[r][i]) : products[r][i];
}

// y [R, 64] = R rows of x times a block; V vectors of columns at a time, as many as the registers hold.
template <int R, int V, typename S>
void multiply(const Int8Inputs& x, int64_t row, const Block<S>& block, float* y) {
  const int64_t depth = x.group / WORD, parts = block.group / x.group;  // words of an input group
  const int8_t* values = x.values + row * x.depth;
  const float* scales = x.scales + row;
  const int32_t* totals = x.sums + row;
  Vec y_sums[R][VECTORS];
  clear(y_sums);
  for (int64_t g = 0; g < x.groups; ++g)
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n += V) {
      IntVec sums[R][V];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sums[r][i] = splat(block.offset ? 0 : -SYMMETRIC_ZERO * totals[g * x.rows + r]);
      const int32_t* words = block.words + g * depth * COLUMNS + n * LANES;
      const int8_t* from = values + g * x.group;
      int64_t k = 0;
      for (; k + WORDS <= depth; k += WORDS) add_words<WORDS>(words + k * COLUMNS, from + k * WORD, x.depth, sums);
      for (; k < depth; ++k) add_words<1>(words + k * COLUMNS, from + k * WORD, x.depth, sums);
      for (int i = 0; i < V; ++i) {
        const int64_t at = (n + i) * LANES;
        const Vec scale = block.scale_of(g / parts, at);
        for (int r = 0; r < R; ++r) {
          Vec value = __builtin_convertvector(sums[r][i], Vec);
          if (block.offset)  // whole numbers below 2^24
            value = multiply_add(block.zero_of(g / parts, at), -static_cast<float>(totals[g * x.rows + r]), value);
          y_sums[r][n + i] = multiply_add(value, scale * scales[g * x.rows + r], y_sums[r][n + i]);
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < VECTORS; ++i) store(y + r * COLUMNS + i * LANES, y_sums[r][i]);
}

#ifdef SPECDEC_TILES
constexpr int64_t FEWEST_TILE_ROWS = 6;  // fewer are faster without tiles, at 4096 x 4096 and at 512 x 256
constexpr int64_t RING_GROUPS = 4;       // whose unpacked codes are kept at a time where one tile of rows reads them
constexpr int64_t KEPT_GROUPS = 16;      // the same where several tiles do: as many as stay in the first cache

// The codes of a group for a vector of columns, less `zero`: a tile [16, 64]. words: of the columns, 64 from row to
// row. later: as many words that are needed later, in the order of memory, as the processor's own prefetch wants them.
[[gnu::always_inline]] inline void unpack_group(const int32_t* words, const int32_t* later, __m512i zero,
    IntVec* codes) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < INPUT_GROUP / WORD; ++k) {
    IntVec word;
    std::memcpy(&word, words + k * COLUMNS, sizeof(word));
    __builtin_prefetch(later + k * LANES, 0, 2);
    codes[2 * k] = (IntVec)_mm512_sub_epi8((__m512i)(word & 0x0f0f0f0f), zero);
    codes[2 * k + 1] = (IntVec)_mm512_sub_epi8((__m512i)(word >> 4 & 0x0f0f0f0f), zero);
  }
}

// Adds groups begin … end - 1 of R rows of x times vector n of a block's columns to y [R, 64]. codes: of group g at g &
// mask. unpack: whether they are not unpacked yet.
template <int R, bool OFFSET, typename S>
void multiply_tiles(const Int8Inputs& x, int64_t row, const Block<S>& block, int64_t n, int64_t begin, int64_t end,
    IntVec* codes, int64_t mask, bool unpack, float* y) {
  constexpr int64_t WORDS = INPUT_GROUP / WORD * COLUMNS;  // of a group
  const int64_t groups = x.groups, parts = block.group / x.group;
  const int32_t *const words = block.words + n * LANES,
                *const later = block.words + groups * WORDS * (VECTORS + n) / VECTORS;  // a quarter of the next block
  const S *const later_scale = block.scale + groups / parts * COLUMNS + n * groups * LANES,
          *const weight_scale = block.scale + n * LANES, *const offset = OFFSET ? block.offset + n * LANES : nullptr;
  const __m512i zero = _mm512_set1_epi8(OFFSET ? 0 : SYMMETRIC_ZERO);
  Vec y_sums[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) y_sums[r] = begin ? load(y + r * COLUMNS) : Vec{};
  const int8_t* const values = x.values + row * x.depth;
  for_each_product(begin, end, x.depth, [=](int64_t g) { return values + g * INPUT_GROUP; },
      [=](int64_t g) { return codes + (g & mask) * TILE_ROWS; },
      [=](int64_t g) {
        if (!unpack) return;
        unpack_group(words + g * WORDS, later + g * WORDS / VECTORS, zero, codes + (g & mask) * TILE_ROWS);
        __builtin_prefetch(later_scale + g * LANES, 0, 2);
      },
      [&](int64_t g, const IntVec* products) __attribute__((always_inline)) {
        const int64_t scale_group = (parts == 1 ? g : g / parts) * COLUMNS;
        const float* const scales = x.scales + g * x.rows + row;
        const int32_t* const totals = x.sums + g * x.rows + row;
        const Vec scale = load(weight_scale + scale_group),
                  group_zero = OFFSET ? SYMMETRIC_ZERO - load(offset + scale_group) : Vec{};
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          Vec value = __builtin_convertvector(products[r], Vec);
          if (OFFSET) value = multiply_add(group_zero, -static_cast<float>(totals[r]), value);
          y_sums[r] = multiply_add(value, scale * scales[r], y_sums[r]);
        }
      });
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(y + r * COLUMNS, y_sums[r]);
}

template <int R, bool OFFSET, typename S>
void multiply_tiles(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
  IntVec codes[KEPT_GROUPS * TILE_ROWS];
  const bool read_once = rows <= R;
  const int64_t part = read_once ? x.groups : KEPT_GROUPS, mask = (read_once ? RING_GROUPS : KEPT_GROUPS) - 1;
  configure_tiles<R>();
  for (int64_t n = 0; n < VECTORS; ++n)
    for (int64_t begin = 0; begin < x.groups; begin += part)
      for (int64_t row = 0; row < rows; row += R)
        multiply_tiles<R, OFFSET>(x, row, block, n, begin, std::min(x.groups, begin + part), codes, mask, row == 0,
            y + row * COLUMNS + n * LANES);
  _tile_release();
}

// y [rows, 64] = x times a block, with the bits of multiply, for input groups of 64: a product of tiles is a group's.
template <typename S>
void multiply_tiles(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, most = (rows + tiles - 1) / tiles;  // rows of a tile
  auto multiply = [&]<bool OFFSET>(std::bool_constant<OFFSET>) {
    if (most <= 8) return multiply_tiles<8, OFFSET>(x, rows, block, y);
    if (most <= 12) return multiply_tiles<12, OFFSET>(x, rows, block, y);
    multiply_tiles<16, OFFSET>(x, rows, block, y);
  };
  block.offset ? multiply(std::true_type{}) : multiply(std::false_type{});
}
#endif

// y [rows, 64] = x times a block
template <typename S>
void multiply_block(const Int8Inputs& x, int64_t rows, const Block<S>& block, float* y) {
#ifdef SPECDEC_TILES
  if (rows >= FEWEST_TILE_ROWS && x.group == 64 && may_use_tiles()) return multiply_tiles(x, rows, block, y);
#endif
  for (int64_t row = 0; row < rows; row += ROWS)
    in_rows<ROWS>(std::min(ROWS, rows - row), [&](auto R) {
      constexpr int V = LANES == 16 ? (R < 8 ? 4 : 2) : R == 1 ? 4 : R == 2 ? 2 : 1;  // whose sums the registers hold
      multiply<R, V>(x, row, block, y + row * COLUMNS);
    });
}

}  // namespace
