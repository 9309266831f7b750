// 4-bit linear layers: specdec::int4_linear.
#pragma once

#include "vectors.h"

namespace {

// y = sum over groups of scale * (sum of x * (code + BIAS) - (zero + BIAS) * sum of x): factors of a group are
// applied to its sum. Eight codes of a column share a word, the first in its lowest bits; the words of 64
// columns are contiguous.

#ifdef __AVX512BF16__
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

inline Vec add_products(Vec sums, Input x, Codes c) { return sums + x * c; }

inline Vec prepare(Vec x, Input* to) {
  store(to, x);
  return x;
}
#endif

inline float prepare_group(const float* x, int64_t depth, Input* to) {  // the inputs of a group; returns their sum
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

template <typename S>
struct Group {  // in one block of columns
  const int32_t* words;
  const S *scale, *offset;  // offset: 8 - zero; null if all zero points are 8
  int64_t depth;            // in words
};

// y [R, 64] += R rows of x times a group; V vectors of columns at a time, limited by the number of registers.
template <int R, int V, typename S>
void multiply(const Input* x, int64_t x_stride, const float* totals, int64_t totals_stride, const Group<S>& group,
    float* y) {
  for (int64_t n = 0; n < COLUMNS; n += V * LANES) {
    Vec sums[R][V] = {};
    for (int64_t k = 0; k < group.depth; ++k) {
      IntVec words[V];
      std::memcpy(words, group.words + k * COLUMNS + n, sizeof(words));
      for (int64_t step = 0; step < STEPS; ++step)
        for (int i = 0; i < V; ++i) {
          const Codes c = codes(words[i], step);
          for (int r = 0; r < R; ++r) sums[r][i] = add_products(sums[r][i], x[r * x_stride + k * STEPS + step], c);
        }
    }
    for (int i = 0; i < V; ++i) {
      const int64_t at = n + i * LANES;
      const Vec scale = load(group.scale + at), zero = 8 - (group.offset ? load(group.offset + at) : Vec{}) + BIAS;
      for (int r = 0; r < R; ++r) {
        float* sum = y + r * COLUMNS + at;
        store(sum, load(sum) + scale * (sums[r][i] - zero * totals[r * totals_stride]));
      }
    }
  }
}

template <typename T, typename S>
struct Weight {  // [N, K]
  const int32_t* codes;
  const S *scale, *offset;  // see Group
  T* out;                   // [M, N]
  int64_t padded, columns, first_block;  // N', N; the first block's index among the blocks of all weights
};

template <typename T, typename S>
void int4_linear_into(const Tensor& x, at::TensorList packed, at::TensorList scales, at::IntArrayRef columns,
    std::vector<Tensor>& y, int64_t first_row) {
  const int64_t rows = rows_of(x), depth = x.size(-1), groups = scales[0].size(1);
  const int64_t words = depth / 8, in_group = words / groups;
  std::vector<Weight<T, S>> weights;
  int64_t blocks = 0;
  for (size_t i = 0; i < columns.size(); ++i) {
    const int64_t padded = scales[i].size(2);
    const S* scale = scales[i].const_data_ptr<S>();
    const S* offset = scales[i].size(0) == 2 ? scale + groups * padded : nullptr;
    weights.push_back({packed[i].const_data_ptr<int32_t>(), scale, offset,
                       y[i].mutable_data_ptr<T>() + first_row * columns[i], padded, columns[i], blocks});
    blocks += padded / COLUMNS;
  }
  std::vector<float> buffer, totals(rows * groups);
  std::vector<Input> inputs(rows * words * STEPS);
  const float* from = floats(x, buffer);
  for (int64_t i = 0; i < rows * groups; ++i)
    totals[i] = prepare_group(from + i * in_group * 8, in_group * 8, &inputs[i * in_group * STEPS]);
  const int64_t grain = std::max<int64_t>(1, WORK / (depth * COLUMNS * std::min<int64_t>(rows, 4)));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(rows * COLUMNS);
    for (int64_t index = begin; index < end; ++index) {
      const Weight<T, S>* weight = &weights.back();
      while (weight->first_block > index) --weight;
      const int64_t block = index - weight->first_block;
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * weight->padded + block * COLUMNS;
        const S* offset = weight->offset ? weight->offset + at : nullptr;
        const Group<S> group{weight->codes + (block * words + g * in_group) * COLUMNS, weight->scale + at, offset,
            in_group};
        for (int64_t row = 0; row < rows; row += ROWS) {
          const Input* in = &inputs[(row * words + g * in_group) * STEPS];
          const float* total = &totals[row * groups + g];
          float* sum = &sums[row * COLUMNS];
          switch (std::min(ROWS, rows - row)) {
            case 1: multiply<1, 4>(in, words * STEPS, total, groups, group, sum); break;
            case 2: multiply<2, 4>(in, words * STEPS, total, groups, group, sum); break;
            case 3: multiply<3, 4>(in, words * STEPS, total, groups, group, sum); break;
            case 4: multiply<4, 4>(in, words * STEPS, total, groups, group, sum); break;
            case 5: multiply<5, 2>(in, words * STEPS, total, groups, group, sum); break;
            case 6: multiply<6, 2>(in, words * STEPS, total, groups, group, sum); break;
            case 7: multiply<7, 2>(in, words * STEPS, total, groups, group, sum); break;
            default: multiply<8, 2>(in, words * STEPS, total, groups, group, sum);
          }
        }
      }
      const int64_t first = block * COLUMNS, count = std::min(COLUMNS, weight->columns - first);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < count; ++n)
          weight->out[row * weight->columns + first + n] = static_cast<T>(sums[row * COLUMNS + n]);
    }
  });
}

template <typename T>
void int4_linear_of(const Tensor& x, at::TensorList packed, at::TensorList scales, at::IntArrayRef columns,
    std::vector<Tensor>& y) {
  for (int64_t first = 0; first < x.size(0); first += CHUNK) {
    const Tensor some = x.narrow(0, first, std::min(CHUNK, x.size(0) - first));
    switch (scales[0].scalar_type()) {
      case at::kFloat: int4_linear_into<T, float>(some, packed, scales, columns, y, first); break;
      case at::kHalf: int4_linear_into<T, Half>(some, packed, scales, columns, y, first); break;
      default: int4_linear_into<T, BFloat16>(some, packed, scales, columns, y, first);
    }
  }
}

std::vector<Tensor> int4_linear(const Tensor& x, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns) {
  TORCH_CHECK(packed.size() == columns.size() && scales.size() == columns.size() && !columns.empty(),
              "int4_linear: lists of one length");
  const Tensor rows = x.contiguous().view({rows_of(x), x.size(-1)});
  std::vector<Tensor> y;
  for (size_t i = 0; i < columns.size(); ++i) {
    TORCH_CHECK(scales[i].size(1) == scales[0].size(1) && scales[i].scalar_type() == scales[0].scalar_type(),
                "int4_linear: weights of one kind");
    auto sizes = x.sizes().vec();
    sizes.back() = columns[i];
    y.push_back(at::empty(sizes, x.options()));
  }
  if (x.scalar_type() == at::kFloat)
    int4_linear_of<float>(rows, packed, scales, columns, y);
  else
    int4_linear_of<BFloat16>(rows, packed, scales, columns, y);
  return y;
}

}  // namespace
