// Attention of up to 16 queries in the tile registers of AMX: queries, keys, values and weights of slots are bfloat16,
// sums float32.
//
// Slots are taken 32 at a time, from a multiple of 32 on; those that a query does not attend to have the weight 0. So a
// query's sums have one order, whatever the other queries are. Its largest score is found before its exponentials.
#pragma once

#include <array>

#include "tiles.h"

namespace {

struct Cache {  // of the keys or values of one row and head
  int64_t stride, dim;
};

struct Slots {  // that queries attend to: first[i] … stop[i] - 1 each of them, and start … end - 1 any of them
  const int64_t *first, *stop;
  int64_t start = 0, end = 0;

  Slots(const int64_t* first, const int64_t* stop, int64_t count) : first(first), stop(stop) {
    for (int64_t i = 0; i < count; ++i) {
      if (first[i] >= stop[i]) continue;
      start = end ? std::min(start, first[i]) : first[i];
      end = std::max(end, stop[i]);
    }
  }
};

}  // namespace

#if defined(SPECDEC_TILES) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define SPECDEC_ATTENTION_TILES

namespace {

constexpr int64_t PAIRS = 16;        // of numbers in a row of a tile
constexpr int64_t PART = 2 * PAIRS;  // slots, or dimensions of keys, of a product of tiles
constexpr int64_t TILE_DIMS = 64;    // of values whose sums are in the registers at a time
static_assert(TILE_ROWS == LANES);   // a query has a lane of the scores, and a row of the sums

inline bool attention_uses_tiles(int64_t dim, int64_t value_dim, double scale) {
  return dim % PART == 0 && value_dim % PART == 0 && scale > 0 && may_use_tiles();
}

// Words of two numbers in bfloat16, low[i] and high[i].
inline IntVec pair_of(Vec low, Vec high) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint16_t, 2 * PAIRS> at{};
    for (int64_t i = 0; i < PAIRS; ++i) at[2 * i] = i, at[2 * i + 1] = PAIRS + i;
    return at;
  }();
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (IntVec)_mm512_permutexvar_epi16(_mm512_load_si512(order.data()), both);
}

// scores [blocks * 32, 16] of 32 slots a block, from slot `origin` on, and 16 queries; `paired`: those, for each 32
// dimensions a tile of which word [i, j] has the dimensions 2 i and 2 i + 1 of query j.
//
// What is computed in a tile arrives late, and until then the tile cannot be used again. So two sets of tiles take
// turns, and a block's scores are stored when the next block's are begun. GCC's functions take the number of a tile as
// text, hence a branch for each set.
inline void score_tiles(const IntVec* paired, const BFloat16* keys, Cache k, int64_t origin, int64_t blocks,
    int64_t capacity, float* scores) {
  constexpr int64_t SIZE = sizeof(BFloat16), HALF = TILE_ROWS * LANES;  // of a block's scores
  for (int64_t block = 0; block <= blocks; ++block) {
    const int64_t slot = origin + block * PART, left = capacity - slot;
    const BFloat16* rows = keys + slot * k.stride;
    int64_t stride = k.stride;
    if (left < PART && block < blocks) {  // the buffer ends in a tile: a copy, with anything behind it
      auto* const rest = scratch<BFloat16, 5>(PART * k.dim);
      for (int64_t i = 0; i < left; ++i) std::memcpy(rest + i * k.dim, rows + i * stride, k.dim * SIZE);
      rows = rest, stride = k.dim;
    }
    const BFloat16* const second = rows + TILE_ROWS * stride;
    float* const to = scores + (block - 1) * 2 * HALF;
    stride *= SIZE;
    asm volatile("" ::"r"(rows), "r"(paired) : "memory");  // GCC 12 does not know that tiles are loaded from memory
    if (block % 2 == 0) {
      if (block < blocks) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < k.dim; d += PART) {
          _tile_loadd(4, paired + d / 2, 64);
          _tile_loadd(5, rows + d, stride);
          _tile_dpbf16ps(0, 5, 4);
          _tile_loadd(6, second + d, stride);
          _tile_dpbf16ps(1, 6, 4);
        }
      }
      if (block > 0) {
        _tile_stored(2, to, 64);
        _tile_stored(3, to + HALF, 64);
      }
    } else {
      if (block < blocks) {
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < k.dim; d += PART) {
          _tile_loadd(4, paired + d / 2, 64);
          _tile_loadd(5, rows + d, stride);
          _tile_dpbf16ps(2, 5, 4);
          _tile_loadd(6, second + d, stride);
          _tile_dpbf16ps(3, 6, 4);
        }
      }
      _tile_stored(0, to, 64);
      _tile_stored(1, to + HALF, 64);
    }
  }
}

inline Vec greater(Vec x, Vec y) { return (Vec)_mm512_max_ps((__m512)x, (__m512)y); }  // y where x is NaN

inline Vec power_of_two(Vec x) {  // 0 below -126; relative error below 3e-6, where weights are rounded to 2e-3
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN too
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = x - (Vec)n;
  Vec p = splat(9.5701022e-3f);
  p = multiply_add(p, f, 5.5917859e-2f);
  p = multiply_add(p, f, 2.4024744e-1f);
  p = multiply_add(p, f, 6.9312179e-1f);
  p = multiply_add(p, f, 9.9999928e-1f);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, n);  // numbers that are not normal take 150 cycles
}

// Scores [blocks * 32, 16], not scaled -> for each 32 slots a tile of their weights: word [i, j] has the slots 2 j and
// 2 j + 1 of query i. first, stop: of the slots of each query, less the first of the scores. Returns sums of weights.
inline Vec weigh_tiles(float* scores, int64_t blocks, IntVec first, IntVec stop, float scale, IntVec* weights) {
  const Vec none = splat(-std::numeric_limits<float>::infinity());
  const int64_t from = maximum(first), to = -maximum(-stop);  // all queries attend to these
  Vec tops[4] = {none, none, none, none};
  for (int64_t block = 0; block < blocks; ++block) {
    float* const at = scores + block * PART * LANES;
    const bool is_whole = block * PART >= from && (block + 1) * PART <= to;
    for (int64_t i = 0; i < PART && !is_whole; ++i) {
      const IntVec slot = splat(static_cast<int32_t>(block * PART + i));
      store(at + i * LANES, (slot >= first) & (slot < stop) ? load(at + i * LANES) : none);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < PART; ++i) tops[i % 4] = greater(load(at + i * LANES), tops[i % 4]);
  }
  constexpr float LOG2_E = 1.44269504f;
  const Vec factor = splat(scale * LOG2_E), largest = greater(greater(tops[0], tops[1]), greater(tops[2], tops[3])),
            top = largest == none ? Vec{} : largest * factor;
  Vec even = {}, odd = {};
  for (int64_t block = 0; block < blocks; ++block, scores += PART * LANES, weights += TILE_ROWS) {
    IntVec pairs[PAIRS];
    const void* rows[PAIRS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < PAIRS; ++i) {
      const Vec low = power_of_two(multiply_add(load(scores + 2 * i * LANES), factor, -top)),
                high = power_of_two(multiply_add(load(scores + (2 * i + 1) * LANES), factor, -top));
      even += low, odd += high;
      pairs[i] = pair_of(low, high);
      rows[i] = &pairs[i];
    }
    transpose(rows, weights);
  }
  return even + odd;
}

// Values of 32 slots from `slot` on and of N * 16 dimensions as N tiles, of which a word of row i has slots 2 i and
// 2 i + 1 of a dimension. Of 32 dimensions, two tiles have four each in turn, the order of the unpacking instructions.
// Slots that no query attends to are zeros.
template <int N>
void pair_values(const BFloat16* values, Cache v, int64_t slot, const Slots& slots, IntVec (*tiles)[PAIRS]) {
  static constexpr BFloat16 zeros[N * PAIRS] = {};
  auto pair = [&](auto row_of) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < PAIRS; ++i) {
      const BFloat16 *low = row_of(slot + 2 * i), *high = row_of(slot + 2 * i + 1);
#pragma GCC unroll 2
      for (int n = 0; n < N; n += 2) {
        const __m512i a = _mm512_loadu_si512(low + n * PAIRS), b = _mm512_loadu_si512(high + n * PAIRS);
        tiles[n][i] = (IntVec)_mm512_unpacklo_epi16(a, b);
        tiles[n + 1][i] = (IntVec)_mm512_unpackhi_epi16(a, b);
      }
    }
  };
  if (slot >= slots.start && slot + PART <= slots.end)
    pair([&](int64_t i) { return values + i * v.stride; });
  else
    pair([&](int64_t i) { return i >= slots.start && i < slots.end ? values + i * v.stride : zeros; });
}

// N * 16 dimensions of y [count, v.dim] = weights of slots times their values / total
template <int N>
void mix_tiles(const IntVec* weights, const BFloat16* values, Cache v, int64_t origin, int64_t blocks,
    const Slots& slots, const float* total, int64_t count, float* y) {
  IntVec paired[2][N][PAIRS];
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (N == 4) {
    _tile_zero(2);
    _tile_zero(3);
  }
  pair_values<N>(values, v, origin, slots, paired[0]);
  for (int64_t block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) pair_values<N>(values, v, origin + (block + 1) * PART, slots, paired[(block + 1) % 2]);
    const auto* const tiles = paired[block % 2];
    asm volatile("" ::"r"(tiles), "r"(weights) : "memory");
    _tile_loadd(6, weights + block * TILE_ROWS, 64);
    _tile_loadd(4, tiles[0], 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, tiles[1], 64);
    _tile_dpbf16ps(1, 6, 5);
    if constexpr (N == 4) {
      _tile_loadd(4, tiles[2], 64);
      _tile_dpbf16ps(2, 6, 4);
      _tile_loadd(5, tiles[3], 64);
      _tile_dpbf16ps(3, 6, 5);
    }
  }
  Vec sums[N][TILE_ROWS];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if constexpr (N == 4) {
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  asm volatile("" ::"r"(&sums) : "memory");
  for (int64_t i = 0; i < count; ++i)
    for (int n = 0; n < N; n += 2) {
      const Vec a = sums[n][i], b = sums[n + 1][i];
      float* to = y + i * v.dim + n * PAIRS;
      store(to, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23) / total[i]);
      store(to + LANES,
          __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31) / total[i]);
    }
}

// y [count, v.dim]: attend for up to 16 queries; `capacity` slots are in memory.
inline void attend_tiles(const BFloat16* const* queries, int64_t count, const BFloat16* keys, Cache k,
    const BFloat16* values, Cache v, int64_t capacity, const Slots& slots, float scale, float* y) {
  const int64_t origin = slots.start / PART * PART, blocks = (slots.end - origin + PART - 1) / PART;
  IntVec first = {}, stop = {};
  for (int64_t i = 0; i < LANES; ++i) {  // lanes without a query repeat the last one, less its numbers
    first[i] = static_cast<int32_t>(slots.first[std::min(i, count - 1)] - origin);
    stop[i] = static_cast<int32_t>(slots.stop[std::min(i, count - 1)] - origin);
  }
  auto* const paired = scratch<IntVec, 1>(k.dim / 2);
  const IntVec zeros = {};
  for (int64_t d = 0; d < k.dim; d += PART) {
    const void* rows[LANES];
    for (int64_t i = 0; i < LANES; ++i) rows[i] = i < count ? static_cast<const void*>(queries[i] + d) : &zeros;
    transpose(rows, paired + d / 2);
  }
  auto* const scores = scratch<float>(blocks * PART * LANES);
  auto* const weights = scratch<IntVec, 2>(blocks * TILE_ROWS);
  configure_tiles<TILE_ROWS>();
  score_tiles(paired, keys, k, origin, blocks, capacity, scores);
  const Vec sums = weigh_tiles(scores, blocks, first, stop, scale, weights);
  float total[LANES];
  store(total, sums == Vec{} ? Vec{} + 1.0f : sums);
  int64_t d = 0;
  for (; d + TILE_DIMS <= v.dim; d += TILE_DIMS)
    mix_tiles<4>(weights, values + d, v, origin, blocks, slots, total, count, y + d);
  if (d < v.dim) mix_tiles<2>(weights, values + d, v, origin, blocks, slots, total, count, y + d);
  _tile_release();
}

}  // namespace
#endif
