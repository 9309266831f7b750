// The operators that take most of the time of a decoding forward on a CPU: 4-bit and dense linear layers, attention.
//
// A row's result does not depend on the number of rows of a call, on its index, or on the number of threads: each
// output is summed in one fixed order. So verifying a draft's tokens together gives the same bits as computing them one
// by one.
//
// Vectors are GCC's and clang's vector extensions (16 floats; the compiler splits them on CPUs with narrower ones).
// specdec_kernels/cpu/__init__.py declares and documents the operators and builds this file.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t COLUMNS = 64;  // output columns of one block of 4-bit weights: four vectors
constexpr int64_t ROWS = 8;      // of inputs that share one read of the weights
constexpr int64_t CHUNK = 256;   // rows whose inputs are prepared at a time, so that they stay in the caches
constexpr int64_t WORK = 1 << 19;  // multiplications of one task of a thread: about ten microseconds

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Vec load(const float* at) {
  Vec v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}

inline Vec load(const BFloat16* at) {
  Halves h;
  std::memcpy(&h, at, sizeof(h));
  Words w = __builtin_convertvector(h, Words) << 16;
  Vec v;
  std::memcpy(&v, &w, sizeof(v));
  return v;
}

inline Vec load(const Half* at) {  // finite values: the exponent biases of the two formats differ by 112
  Halves h;
  std::memcpy(&h, at, sizeof(h));
  Words w = __builtin_convertvector(h, Words);
  w = (w & 0x8000) << 16 | (w & 0x7fff) << 13;
  Vec v;
  std::memcpy(&v, &w, sizeof(v));
  return v * 0x1p112f;
}

inline void store(float* at, Vec v) { std::memcpy(at, &v, sizeof(v)); }

template <typename T>
Vec load_some(const T* at, int64_t count) {  // the first `count` values, then zeros
  T padded[LANES] = {};
  std::memcpy(padded, at, count * sizeof(T));
  return load(padded);
}

inline Vec splat(float x) { return x - Vec{}; }

inline float sum(Vec v) {  // adds halves to halves, in a fixed order
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  return v[0] + v[1];
}

typedef float Four __attribute__((vector_size(16)));

inline Four sums_of(const Vec* v) {  // the sums of four vectors, each in the order of sum()
  auto halves = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  Vec a = halves(v[0], v[1]), b = halves(v[2], v[3]);
  Vec w = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  w += __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  w += __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(w, w, 0, 4, 8, 12);
}

inline Vec exponential(Vec x) {  // x <= 0; error up to 2 units in the last place; 0 below -87
  const Vec low = splat(-87.0f);
  IntVec dropped = x < low;
  x = dropped ? low : x;
  Vec n = x * 1.44269504f + 12582912.0f;  // adding and subtracting 1.5 * 2^23 rounds to an integer
  IntVec bits;
  std::memcpy(&bits, &n, sizeof(n));
  n -= 12582912.0f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IntVec power = ((bits & 0xff) << 24 >> 24) + 127 << 23;  // n fits into 8 bits
  Vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  Vec y = p * scale;
  return dropped ? Vec{} : y;
}

// x [M, K] as floats: x itself, or a copy in `buffer`
inline const float* floats(const Tensor& x, std::vector<float>& buffer) {
  if (x.scalar_type() == at::kFloat) return x.const_data_ptr<float>();
  const BFloat16* from = x.const_data_ptr<BFloat16>();
  buffer.resize(x.numel());
  for (int64_t i = 0; i < x.numel(); ++i) buffer[i] = static_cast<float>(from[i]);
  return buffer.data();
}

inline int64_t rows_of(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

// ---- 4-bit linear
//
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

// ---- dense linear

template <int R, int N, typename T>
void dots(const float* x, int64_t depth, const T* w, float* y, int64_t y_stride) {  // R rows of x times N rows of W
  Vec sums[R][N] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Vec v[N];
    for (int n = 0; n < N; ++n) v[n] = load(w + n * depth + k);
    for (int r = 0; r < R; ++r) {
      Vec value = load(x + r * depth + k);
      for (int n = 0; n < N; ++n) sums[r][n] += value * v[n];
    }
  }
  if (k < depth)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        sums[r][n] += load_some(x + r * depth + k, depth - k) * load_some(w + n * depth + k, depth - k);
  for (int r = 0; r < R; ++r) {
    if constexpr (N == 4) {
      Four four = sums_of(sums[r]);
      std::memcpy(y + r * y_stride, &four, sizeof(four));
    } else {
      for (int n = 0; n < N; ++n) y[r * y_stride + n] = sum(sums[r][n]);
    }
  }
}

template <int N, typename T>
void dots_of_rows(const float* x, int64_t rows, int64_t depth, const T* w, float* y, int64_t y_stride) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) dots<4, N>(x + row * depth, depth, w, y + row * y_stride, y_stride);
  if (rows - row == 3) dots<3, N>(x + row * depth, depth, w, y + row * y_stride, y_stride);
  if (rows - row == 2) dots<2, N>(x + row * depth, depth, w, y + row * y_stride, y_stride);
  if (rows - row == 1) dots<1, N>(x + row * depth, depth, w, y + row * y_stride, y_stride);
}

template <typename T>
void linear_into(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& y) {
  const int64_t rows = rows_of(x), depth = x.size(-1), columns = weight.size(0);
  std::vector<float> buffer;
  const float* inputs = floats(x, buffer);
  const T* w = weight.const_data_ptr<T>();
  const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
  T* out = y.mutable_data_ptr<T>();
  const int64_t tiles = (columns + 3) / 4,
                grain = std::max<int64_t>(1, WORK / (depth * 4 * std::min<int64_t>(rows, 4)));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(rows * 4);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * 4, count = std::min<int64_t>(4, columns - first);
      if (count == 4)
        dots_of_rows<4>(inputs, rows, depth, w + first * depth, sums.data(), 4);
      else
        for (int64_t n = 0; n < count; ++n)
          dots_of_rows<1>(inputs, rows, depth, w + (first + n) * depth, sums.data() + n, 4);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < count; ++n) {
          T value = static_cast<T>(sums[row * 4 + n]);
          out[row * columns + first + n] =
              b ? static_cast<T>(static_cast<float>(value) + static_cast<float>(b[first + n])) : value;
        }
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  Tensor y = at::empty(sizes, x.options());
  x.scalar_type() == at::kFloat ? linear_into<float>(rows, weight, bias, y)
                                : linear_into<BFloat16>(rows, weight, bias, y);
  return y;
}

// ---- attention

struct Cache {  // of the keys or values of one row and head
  int64_t stride, dim;
};

// N vectors of each of R weighted sums of values
template <int R, int N, typename T>
void mix(const float* weights, int64_t capacity, const T* values, Cache v, int64_t num_slots, const float* total,
    float* y) {
  Vec sums[R][N] = {};
  for (int64_t j = 0; j < num_slots; ++j)
    for (int n = 0; n < N; ++n) {
      const Vec value = load(values + j * v.stride + n * LANES);
      for (int r = 0; r < R; ++r) sums[r][n] += weights[r * capacity + j] * value;
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(y + r * v.dim + n * LANES, sums[r][n] / total[r]);
}

// R queries of one row and one key head, over the slots that any of them attends to. Slots that a query does not attend
// to have the weight 0 in its sum.
template <int R, typename T>
void attend(const float* x, const T* keys, Cache k, const T* values, Cache v, const int64_t* first,
    const int64_t* stop, float* y) {
  int64_t start = std::numeric_limits<int64_t>::max(), end = 0;
  for (int r = 0; r < R; ++r)
    if (first[r] < stop[r]) start = std::min(start, first[r]), end = std::max(end, stop[r]);
  const int64_t num_slots = std::max<int64_t>(0, end - start);
  if (num_slots == 0) start = 0;
  const int64_t capacity = num_slots + 2 * LANES;
  std::vector<float> scores(R * capacity);
  for (int64_t j = 0; j < num_slots; j += 4) {
    const T* four[4];  // keys; beyond the last slot the last key is repeated
    for (int64_t i = 0; i < 4; ++i) four[i] = keys + (start + std::min(j + i, num_slots - 1)) * k.stride;
    Vec dots[R][4] = {};
    int64_t d = 0;
    for (; d + LANES <= k.dim; d += LANES) {
      Vec part[4];
      for (int i = 0; i < 4; ++i) part[i] = load(four[i] + d);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) dots[r][i] += load(x + r * k.dim + d) * part[i];
    }
    if (d < k.dim)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i)
          dots[r][i] += load_some(x + r * k.dim + d, k.dim - d) * load_some(four[i] + d, k.dim - d);
    for (int r = 0; r < R; ++r) {
      const Four sums = sums_of(dots[r]);
      std::memcpy(&scores[r * capacity + j], &sums, sizeof(sums));
    }
  }
  float total[R];
  for (int r = 0; r < R; ++r) {
    float* row = &scores[r * capacity];
    const bool has_slots = first[r] < stop[r];
    const int64_t from = has_slots ? first[r] - start : 0, to = has_slots ? stop[r] - start : 0;
    std::fill(row, row + from, 0.0f);
    std::fill(row + to, row + capacity, -std::numeric_limits<float>::infinity());
    Vec top = splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = from; j < to; j += LANES) {
      const Vec some = load(row + j);
      top = some > top ? some : top;
    }
    float largest = top[0];
    for (int64_t i = 1; i < LANES; ++i) largest = std::max(largest, top[i]);
    Vec sums = {};
    for (int64_t j = from; j < to; j += LANES) {
      const Vec p = exponential(load(row + j) - largest);
      store(row + j, p);
      sums += p;
    }
    std::fill(row + to, row + capacity, 0.0f);
    total[r] = to > from ? sum(sums) : 1.0f;
  }
  int64_t d = 0;
  values += start * v.stride;
  for (; d + 4 * LANES <= v.dim; d += 4 * LANES)
    mix<R, 4>(scores.data(), capacity, values + d, v, num_slots, total, y + d);
  for (; d + LANES <= v.dim; d += LANES) mix<R, 1>(scores.data(), capacity, values + d, v, num_slots, total, y + d);
  if (d < v.dim)
    for (int r = 0; r < R; ++r) {
      Vec sums = {};
      for (int64_t j = 0; j < num_slots; ++j)
        sums += scores[r * capacity + j] * load_some(values + j * v.stride + d, v.dim - d);
      sums /= total[r];
      std::memcpy(y + r * v.dim + d, &sums, (v.dim - d) * sizeof(float));
    }
}

template <typename T>
void attention_into(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first,
    const Tensor& last, double scale, Tensor& y) {
  const int64_t heads = query.size(1), width = query.size(2), dim = query.size(3), value_dim = value.size(3),
      slots = key.size(2);
  const int64_t kv_heads = key.size(1), group = heads / kv_heads, queries = group * width, units = (queries + 3) / 4;
  const T *q = query.const_data_ptr<T>(), *k = key.const_data_ptr<T>(), *v = value.const_data_ptr<T>();
  const int32_t *from = first.const_data_ptr<int32_t>(), *to = last.const_data_ptr<int32_t>();
  T* out = y.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, WORK / std::max<int64_t>(1, 4 * slots * dim));
  at::parallel_for(0, query.size(0) * kv_heads * units, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> x(4 * dim), mixed(4 * value_dim);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / (kv_heads * units), kv_head = index / units % kv_heads, unit = index % units * 4;
      const int64_t count = std::min<int64_t>(4, queries - unit);
      int64_t starts[4], stops[4];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        const T* own = q + row * query.stride(0) + head * query.stride(1) + column * query.stride(2);
        for (int64_t d = 0; d < dim; ++d) x[i * dim + d] = static_cast<float>(own[d]) * static_cast<float>(scale);
        starts[i] = std::max<int64_t>(0, from[row * width + column]);
        stops[i] = std::min<int64_t>(slots, to[row * width + column] + 1);
      }
      const T* keys = k + row * key.stride(0) + kv_head * key.stride(1);
      const T* values = v + row * value.stride(0) + kv_head * value.stride(1);
      const Cache of_keys{key.stride(2), dim}, of_values{value.stride(2), value_dim};
      switch (count) {
        case 1: attend<1>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        case 2: attend<2>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        case 3: attend<3>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        default: attend<4>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data());
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        T* at = out + ((row * width + column) * heads + head) * value_dim;
        for (int64_t d = 0; d < value_dim; ++d) at[d] = static_cast<T>(mixed[i * value_dim + d]);
      }
    }
  });
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first, const Tensor& last,
    double scale) {
  const auto dtype = query.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    return attention(query.to(at::kFloat), key.to(at::kFloat), value.to(at::kFloat), first, last, scale).to(dtype);
  Tensor y = at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, query.options());
  Tensor from = first.contiguous(), to = last.contiguous();
  dtype == at::kFloat ? attention_into<float>(query, key, value, from, to, scale, y)
                      : attention_into<BFloat16>(query, key, value, from, to, scale, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("int4_linear", int4_linear);
  m.impl("linear", linear);
  m.impl("attention", attention);
  m.impl("mean", [](const Tensor& x) { return at::mean(x, {-1}, true); });
  m.impl("cos", [](const Tensor& x) { return at::cos(x); });
  m.impl("sin", [](const Tensor& x) { return at::sin(x); });
  m.impl("tanh", [](const Tensor& x) { return at::tanh(x); });
  m.impl("torch_linear", [](const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    return at::linear(x, weight, bias);
  });
  m.impl("softmax", [](const Tensor& x, int64_t dim, std::optional<at::ScalarType> dtype) {
    return at::softmax(x, dim, dtype);
  });
  m.impl("sum", [](const Tensor& x, at::OptionalIntArrayRef dim, bool keepdim, std::optional<at::ScalarType> dtype) {
    return at::sum(x, dim, keepdim, dtype);
  });
  m.impl("gelu", [](const Tensor& x, c10::string_view approximate) { return at::gelu(x, approximate); });
  m.impl("layer_norm", [](const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
      double eps) {
    return at::layer_norm(x, {x.size(-1)}, weight, bias, eps);
  });
}
