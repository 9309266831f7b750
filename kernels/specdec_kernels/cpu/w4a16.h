// 4-bit linear layers on inputs in bfloat16, where the CPU multiplies it, else in float32.
//
// y = sum over groups of scale * (sum of x * (code + BIAS) - (zero + BIAS) * sum of x): factors of a group are applied
// to its sum.
#pragma once

#include "int4_weights.h"

namespace {

#if defined(SPECDEC_AVX512) && defined(__AVX512BF16__)
// Two products per instruction, of inputs rounded to bfloat16: code j of a word in the lower half, j + 4 in the upper
// one. A code needs no conversion: in the last bits of bfloat16's 128, where its step is 1, it gives the number
// 128 + code.
typedef uint32_t Input;
typedef IntVec Codes;
constexpr int64_t STEPS = 4;  // per word
constexpr float BIAS = 128;

inline Codes codes(IntVec words, int64_t step) { return (words >> 4 * step & 0x000f000f) | 0x43004300; }

inline Vec add_products(Vec sums, Input x, Codes c) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)c);
}

inline Vec prepare(Vec x, Input* to) {  // the inputs of two words; returns x as rounded
  x = __builtin_shufflevector(x, x, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &rounded, sizeof(rounded));
  return load(reinterpret_cast<const BFloat16*>(to));
}
#else
typedef float Input;
typedef Vec Codes;
constexpr int64_t STEPS = 8;
constexpr float BIAS = 0;

inline Codes codes(IntVec words, int64_t step) { return __builtin_convertvector(words >> 4 * step & 15, Vec); }

inline Vec add_products(Vec sums, Input x, Codes c) { return multiply_add(c, x, sums); }

inline Vec prepare(Vec x, Input* to) {
  store(to, x);
  return x;
}
#endif

template <typename T>
float prepare_group(const T* x, int64_t depth, Input* to) {  // the inputs of a group; returns their sum
  Vec total = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) total += prepare(load(x + k), to + k / 8 * STEPS);
  if (k < depth) {  // one more word
    Input two[2 * STEPS];
    total += prepare(load_some(x + k, 8), two);
    std::memcpy(to + k / 8 * STEPS, two, STEPS * sizeof(Input));
  }
  return sum(total);
}

// The rows of inputs x [M, K], rounded, and the sums of each group.
struct RoundedInputs {
  int64_t depth, groups;
  std::vector<Input> values;
  std::vector<float> totals;  // [M, K / group]

  template <typename T>
  RoundedInputs(const T* x, int64_t rows, int64_t depth, int64_t group)
      : depth(depth / WORD * STEPS), groups(depth / group), values(rows * this->depth), totals(rows * groups) {
    for (int64_t i = 0; i < rows * groups; ++i)
      totals[i] = prepare_group(x + i * group, group, &values[i * group / WORD * STEPS]);
  }
};

// y [R, 64] += R rows of x times group g of a block; V vectors of columns at a time, as many as fit the registers.
template <int R, int V, typename S>
void multiply(const RoundedInputs& x, int64_t row, const Block<S>& block, int64_t g, float* y) {
  const int64_t depth = block.group / WORD;  // in words
  const Input* in = &x.values[row * x.depth + g * depth * STEPS];
  const float* totals = &x.totals[row * x.groups + g];
  for (int64_t n = 0; n < COLUMNS; n += V * LANES) {
    Vec sums[R][V];
    clear(sums);
    for (int64_t k = 0; k < depth; ++k) {
      IntVec words[V];
      std::memcpy(words, block.words + (g * depth + k) * COLUMNS + n, sizeof(words));
      for (int64_t step = 0; step < STEPS; ++step)
        for (int i = 0; i < V; ++i) {
          const Codes c = codes(words[i], step);
          for (int r = 0; r < R; ++r) sums[r][i] = add_products(sums[r][i], in[r * x.depth + k * STEPS + step], c);
        }
    }
    for (int i = 0; i < V; ++i) {
      const int64_t at = n + i * LANES;
      const Vec scale = block.scale_of(g, at), zero = block.zero_of(g, at) + BIAS;
      for (int r = 0; r < R; ++r) {
        float* sum = y + r * COLUMNS + at;
        store(sum, multiply_add(scale, multiply_add(zero, -totals[r * x.groups], sums[r][i]), load(sum)));
      }
    }
  }
}

// y [rows, 64] = x times a block
template <typename S>
void multiply_block(const RoundedInputs& x, int64_t rows, const Block<S>& block, float* y) {
  std::fill(y, y + rows * COLUMNS, 0.0f);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t row = 0; row < rows; row += ROWS)
      in_rows<ROWS>(std::min(ROWS, rows - row), [&](auto R) {
        constexpr int SUMS = LANES == 16 ? 16 : 8, V = R > SUMS / 2 ? 1 : R > SUMS / 4 ? 2 : 4;  // of the registers
        multiply<R, V>(x, row, block, g, y + row * COLUMNS);
      });
}

}  // namespace
