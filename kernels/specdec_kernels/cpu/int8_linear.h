// Linear layers on 8-bit weights with a scale a row, such as output heads: specdec::int8_linear.
//
// y = scale * sum over input groups of input scale * (sum of x * w), the inner sums in integers, on inputs rounded to 8
// bits; else y = scale * sum of x * w in float32.
#pragma once

#include "linear.h"
#include "tiles.h"

namespace {

// The sums of each lane's four products, of signed bytes of w from -127 on.
inline IntVec signed_byte_products(IntVec w, IntVec x) {
#if defined(__AVX512VNNI__) || (defined(SPECDEC_AVX2) && defined(__AVXVNNI__))
  const IntVec offset = splat(static_cast<int32_t>(0x80808080));  // its sum is computed once for all w
  return add_byte_products(-add_byte_products(IntVec{}, offset, x), w ^ offset, x);
#elif defined(SPECDEC_AVX512)
  const __m512i magnitudes = _mm512_abs_epi8((__m512i)w),
                signed_x = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), __m512i{}, (__m512i)x);
  return add_byte_products(IntVec{}, (IntVec)magnitudes, (IntVec)signed_x);
#elif defined(SPECDEC_AVX2)
  return add_byte_products(IntVec{}, (IntVec)_mm256_abs_epi8((__m256i)w),
      (IntVec)_mm256_sign_epi8((__m256i)x, (__m256i)w));
#elif defined(__ARM_FEATURE_DOTPROD)
  return add_byte_products(IntVec{}, w, x);
#else
  IntVec sums = {};
  for (int i = 0; i < 4; ++i) sums += (w << 24 - 8 * i >> 24) * (x << 24 - 8 * i >> 24);
  return sums;
#endif
}

template <int G>
IntVec load_bytes(const int8_t* at) {  // G of them, then zeros; at most a vector
  IntVec v = {};
  std::memcpy(&v, at, std::min<size_t>(G, sizeof(v)));
  return v;
}

// y [R, N] = R rows of inputs times N rows of W, without the scales of W; stride: from row to row of y; G: bytes of an
// input group
template <int R, int N, int G>
void dots(const Int8Inputs& x, int64_t row, const int8_t* w, float* y, int64_t stride) {
  constexpr int VECTOR = sizeof(IntVec), PARTS = (G + VECTOR - 1) / VECTOR;  // of a group
  const int8_t* values = x.values + row * x.depth;
  const float* scales = x.scales + row;
  Vec sums[R][N];
  clear(sums);
  for (int64_t g = 0; g < x.groups; ++g) {
    IntVec weights[N][PARTS];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < PARTS; ++i) weights[n][i] = load_bytes<G>(w + n * x.depth + g * G + i * VECTOR);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      IntVec in[PARTS];
#pragma GCC unroll 2
      for (int i = 0; i < PARTS; ++i) in[i] = load_bytes<G>(values + r * x.depth + g * G + i * VECTOR);
      const float scale = scales[g * x.rows + r];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        IntVec products = signed_byte_products(weights[n][0], in[0]);
#pragma GCC unroll 2
        for (int i = 1; i < PARTS; ++i) products += signed_byte_products(weights[n][i], in[i]);
        sums[r][n] = multiply_add(__builtin_convertvector(products, Vec), scale, sums[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (N == 4) {
      const Four four = sums_of(sums[r]);
      std::memcpy(y + r * stride, &four, sizeof(four));
    } else {
      for (int n = 0; n < N; ++n) y[r * stride + n] = sum(sums[r][n]);
    }
  }
}

template <int N, int G>
void dots_of_rows(const Int8Inputs& x, int64_t rows, const int8_t* w, float* y, int64_t stride) {
  constexpr int64_t MOST = LANES == 16 ? 4 : 2;  // that have their sums in registers
  for (int64_t row = 0; row < rows; row += MOST)
    in_rows<MOST>(std::min(MOST, rows - row), [&](auto R) { dots<R, N, G>(x, row, w, y + row * stride, stride); });
}

template <int N>
void dots_of_rows(const Int8Inputs& x, int64_t rows, const int8_t* w, float* y, int64_t stride) {
  switch (x.group) {
    case 64: return dots_of_rows<N, 64>(x, rows, w, y, stride);
    case 32: return dots_of_rows<N, 32>(x, rows, w, y, stride);
    default: return dots_of_rows<N, 16>(x, rows, w, y, stride);
  }
}

#ifdef SPECDEC_TILES
// Lane j of vector i to lane i of vector j.
[[gnu::always_inline]] inline void transpose(Vec (&v)[LANES]) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    Vec pairs[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      const Vec a = v[i], b = v[i + LANES / 2];
      pairs[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      pairs[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = pairs[i];
  }
}

// y [M, N]: of up to 16 rows of x from `row` on, times `tiles` times 16 rows of W from the begin-th 16 on. The last 16
// may begin earlier, and repeat some.
template <typename T, typename S>
void int8_linear_tiles(const Int8Inputs& x, int64_t row, const IntVec* inputs, const int8_t* w, const S* scale,
    int64_t columns, int64_t begin, int64_t tiles, T* y) {
  const int64_t groups = x.groups, depth = x.depth, rows = std::min(TILE_ROWS, x.rows - row);
  const auto first_of = [=](int64_t tile) { return std::min(tile * TILE_ROWS, columns - TILE_ROWS); };
  const int8_t* const later = w + (begin + 1) * TILE_ROWS * depth;
  int64_t tile = begin, group = 0, added_tile = begin, added_group = 0;
  const int8_t* from = w + first_of(tile) * depth;
  Vec sums[TILE_ROWS] = {};  // of a row of W and 16 rows of x
  for_each_product(0, tiles * groups, depth,
      [&](int64_t) __attribute__((always_inline)) { return from + group * INPUT_GROUP; },
      [&](int64_t) __attribute__((always_inline)) {
        const IntVec* const now = inputs + group * TILE_ROWS;
        if (++group == groups) group = 0, from = w + first_of(++tile) * depth;
        return now;
      },
      [=](int64_t i) {
        if (row) return;
#pragma GCC unroll 16
        for (int n = 0; n < TILE_ROWS; ++n) __builtin_prefetch(later + (i * TILE_ROWS + n) * INPUT_GROUP, 0, 2);
      },
      [&](int64_t, const IntVec* products) __attribute__((always_inline)) {
        const Vec scales = load(x.scales + added_group * x.rows + row);
#pragma GCC unroll 16
        for (int n = 0; n < TILE_ROWS; ++n)
          sums[n] = multiply_add(__builtin_convertvector(products[n], Vec), scales, sums[n]);
        if (++added_group < groups) return;
        const int64_t first = first_of(added_tile++);
        const Vec weight_scales = load(scale + first);
        added_group = 0;
        transpose(sums);
        T* const to = y + row * columns + first;
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; ++r) {
          if (r < rows) store(to + r * columns, sums[r] * weight_scales);
          sums[r] = Vec{};
        }
      });
}

// y [M, N] = rows of x times all rows of W, in groups of 64. A product's rows are rows of W, its columns rows of x, so
// that reading W takes as long for one row as for 16. The bits of a result depend neither on M nor on its row.
template <typename T, typename S>
void int8_linear_tiles(const Int8Inputs& x, const int8_t* w, const S* scale, int64_t columns, T* y) {
  constexpr int64_t PART_BYTES = 1 << 16;  // of W, which all rows read before the next ones
  const int64_t depth = x.depth, rows = x.rows, words = depth / 4;
  const int64_t tiles = (columns + TILE_ROWS - 1) / TILE_ROWS, row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  IntVec* const inputs = scratch<IntVec>(row_tiles * words);  // [row tile, word of a row, 16 rows]
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* to = reinterpret_cast<int32_t*>(inputs + row / TILE_ROWS * words) + row % TILE_ROWS;
    for (int64_t i = 0; i < words; ++i) std::memcpy(to + i * LANES, x.values + row * depth + 4 * i, 4);
  }
  const int64_t grain = std::max<int64_t>(1, 4 * WORK / (depth * TILE_ROWS * row_tiles)),
                part = std::max<int64_t>(1, PART_BYTES / (depth * TILE_ROWS));
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    configure_tiles<TILE_ROWS>();
    for (; begin < end; begin += part)
      for (int64_t row = 0; row < rows; row += TILE_ROWS)
        int8_linear_tiles(x, row, inputs + row / TILE_ROWS * words, w, scale, columns, begin,
            std::min(part, end - begin), y);
    _tile_release();
  });
}
#endif

template <typename T, typename S>
void int8_linear_into(const Tensor& x, const Tensor& weight, const S* scale, Tensor& y) {
  constexpr int64_t TILE = 4, BLOCK = 64;  // rows of W that share the reads of the inputs; of a task
  const int64_t rows = rows_of(x), depth = x.size(-1), columns = weight.size(0);
  const int8_t* w = data<int8_t>(weight);
  T* out = mutable_data<T>(y);
  const Int8Inputs inputs(data<T>(x), rows, depth, std::gcd(depth, INPUT_GROUP), false);
#ifdef SPECDEC_TILES
  if (inputs.group == 64 && columns >= TILE_ROWS && may_use_tiles())
    return int8_linear_tiles(inputs, w, scale, columns, out);
#endif
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK,
                grain = std::max<int64_t>(1, 4 * WORK / (depth * BLOCK * rows));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    float* sums = scratch<float, 1>(rows * BLOCK);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * BLOCK, count = std::min(BLOCK, columns - first);
      int64_t n = 0;
      for (; n + TILE <= count; n += TILE) dots_of_rows<TILE>(inputs, rows, w + (first + n) * depth, sums + n, BLOCK);
      for (; n < count; ++n) dots_of_rows<1>(inputs, rows, w + (first + n) * depth, sums + n, BLOCK);
      for (int64_t row = 0; row < rows; ++row)
        in_vectors(count, [&](int64_t n, auto read, auto write) {
          write(out + row * columns + first + n, load(sums + row * BLOCK + n) * read(scale + first + n));
        });
    }
  });
}

template <typename T, typename S>
void int8_linear_of(const Tensor& x, const Tensor& weight, const Tensor& scale, bool int8_inputs, Tensor& y) {
  const S* scales = data<S>(scale);
  int8_inputs ? int8_linear_into<T, S>(x, weight, scales, y)
              : linear_into<T, int8_t, S>(data<T>(x), rows_of(x), weight, scales, nullptr,
                    mutable_data<T>(y));
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, bool int8_inputs) {
  TORCH_CHECK(x.size(-1) % 16 == 0, "int8_linear: rows of a multiple of 16 columns");
  if (scale.scalar_type() != at::kFloat && scale.scalar_type() != at::kBFloat16)
    return int8_linear(x, weight, scale.to(at::kFloat), int8_inputs);
  const Tensor rows = x.contiguous();
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(0);
  Tensor y = empty(sizes, x.scalar_type());
  const bool has_float_scales = scale.scalar_type() == at::kFloat;
  if (x.scalar_type() == at::kFloat)
    has_float_scales ? int8_linear_of<float, float>(rows, weight, scale, int8_inputs, y)
                     : int8_linear_of<float, BFloat16>(rows, weight, scale, int8_inputs, y);
  else
    has_float_scales ? int8_linear_of<BFloat16, float>(rows, weight, scale, int8_inputs, y)
                     : int8_linear_of<BFloat16, BFloat16>(rows, weight, scale, int8_inputs, y);
  return y;
}

}  // namespace
