// Vectors of 16 floats in GCC's and clang's vector extensions; the compiler splits them on CPUs with narrower ones.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "threads.h"

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t TILE_ROWS = 16;  // of a matrix in AMX's registers: scratch arrays hold as many rows beyond M
constexpr int64_t WORK = 1 << 16;  // multiplications of one task of a thread: one or two microseconds

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

// The data of a tensor of T: const_data_ptr<T> and mutable_data_ptr<T>, inlined.
template <typename T>
const T* data(const Tensor& x) {
  TORCH_CHECK(x.dtype() == caffe2::TypeMeta::Make<T>(), "expected a tensor of another dtype than ", x.dtype());
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  TORCH_CHECK(x.dtype() == caffe2::TypeMeta::Make<T>(), "expected a tensor of another dtype than ", x.dtype());
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* at) {
  Vec v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}

inline Words load_words(const void* at) {  // 16 numbers of 16 bits
#ifdef __AVX512F__  // one instruction; GCC 12 makes five of the conversion below
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
#else
  Halves h;
  std::memcpy(&h, at, sizeof(h));
  return __builtin_convertvector(h, Words);
#endif
}

inline Vec load(const BFloat16* at) {
  Words w = load_words(at) << 16;
  Vec v;
  std::memcpy(&v, &w, sizeof(v));
  return v;
}

inline Vec load(const Half* at) {  // finite values: the exponent biases of the two formats differ by 112
  Words w = load_words(at);
  w = (w & 0x8000) << 16 | (w & 0x7fff) << 13;
  Vec v;
  std::memcpy(&v, &w, sizeof(v));
  return v * 0x1p112f;
}

inline Vec load(const int8_t* at) {
  Bytes bytes;
  std::memcpy(&bytes, at, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
}

inline void store(float* at, Vec v) { std::memcpy(at, &v, sizeof(v)); }

inline void store(BFloat16* at, Vec v) {  // rounds to nearest even; NaN stays NaN
  Words w;
  std::memcpy(&w, &v, sizeof(w));
  Words nearest = (w + 0x7fff + (w >> 16 & 1)) >> 16;
  IntVec is_nan = v != v;
  nearest = is_nan ? Words{} + 0x7fc0 : nearest;
#ifdef __AVX512F__
  const Halves h = (Halves)_mm512_cvtepi32_epi16((__m512i)nearest);
#else
  const Halves h = __builtin_convertvector(nearest, Halves);
#endif
  std::memcpy(at, &h, sizeof(h));
}

template <typename T>
Vec rounded_to(Vec v) {  // to the values of T
  T values[LANES];
  store(values, v);
  return load(values);
}

template <typename T>
Vec load_some(const T* at, int64_t count) {  // the first `count` values, then zeros
  T padded[LANES] = {};
  std::memcpy(padded, at, count * sizeof(T));
  return load(padded);
}

template <typename T>
void store_some(T* at, Vec v, int64_t count) {
  T values[LANES];
  store(values, v);
  std::memcpy(at, values, count * sizeof(T));
}

inline void store(float* at, const float* values, int64_t count) { std::memcpy(at, values, count * sizeof(float)); }

inline void store(BFloat16* at, const float* values, int64_t count) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) store(at + k, load(values + k));
  if (k < count) store_some(at + k, load_some(values + k, count - k), count - k);
}

// Calls f(k, read, write) for every LANES elements of `depth`, from k on. read and write are load and store, at the end
// of the elements that are left.
template <typename F>
void in_vectors(int64_t depth, F f) {
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES)
    f(k, [](const auto* at) { return load(at); }, [](auto* at, Vec v) { store(at, v); });
  if (const int64_t rest = depth - k; rest > 0)
    f(k, [=](const auto* at) { return load_some(at, rest); }, [=](auto* at, Vec v) { store_some(at, v, rest); });
}

// A product to which something is added, as PyTorch's operators compute it: not fused into one rounding.
template <typename V>
V unfused(V product) {
  asm("" : "+m"(product));
  return product;
}

// Memory of this thread for `count` values of any content, until its next call for the same T and USE; aligned, so that
// a vector is in one line of the caches.
template <typename T, int USE = 0>
T* scratch(int64_t count) {
  static thread_local std::vector<T> memory;
  const size_t size = count * sizeof(T), space = size + sizeof(Vec);
  if (memory.size() * sizeof(T) < space) memory.resize(space / sizeof(T));
  void* at = memory.data();
  size_t left = space;
  return static_cast<T*>(std::align(sizeof(Vec), size, at, left));
}

inline IntVec splat(int32_t x) { return x - IntVec{}; }

// f of all lanes: of halves with halves, in a fixed order; the result is in the first two lanes, to be combined by f.
template <typename V, typename F>
V halved(V v, F f) {
  v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  return f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
}

inline float sum(Vec v) {
  v = halved(v, [](Vec a, Vec b) { return a + b; });
  return v[0] + v[1];
}

inline int32_t sum(IntVec v) {
  v = halved(v, [](IntVec a, IntVec b) { return a + b; });
  return v[0] + v[1];
}

template <typename V>
auto maximum(V v) {
  v = halved(v, [](V a, V b) { return a > b ? a : b; });
  return std::max(v[0], v[1]);
}

// columns[i][j] = word i of rows[j]: sixteen rows of sixteen words
inline void transpose(const void* const* rows, IntVec* columns) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < LANES; i += 4) {  // four words of the rows j, j + 4, j + 8, j + 12 in a vector
    auto words = [&](int64_t row) { return _mm_loadu_si128(static_cast<const __m128i*>(rows[row]) + i / 4); };
    __m512i four[4];
    for (int64_t j = 0; j < 4; ++j) {
      four[j] = _mm512_inserti32x4(_mm512_castsi128_si512(words(j)), words(j + 4), 1);
      four[j] = _mm512_inserti32x4(_mm512_inserti32x4(four[j], words(j + 8), 2), words(j + 12), 3);
    }
    const __m512i low[2] = {_mm512_unpacklo_epi32(four[0], four[1]), _mm512_unpacklo_epi32(four[2], four[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(four[0], four[1]), _mm512_unpackhi_epi32(four[2], four[3])};
    columns[i] = (IntVec)_mm512_unpacklo_epi64(low[0], low[1]);
    columns[i + 1] = (IntVec)_mm512_unpackhi_epi64(low[0], low[1]);
    columns[i + 2] = (IntVec)_mm512_unpacklo_epi64(high[0], high[1]);
    columns[i + 3] = (IntVec)_mm512_unpackhi_epi64(high[0], high[1]);
  }
#else
  for (int64_t i = 0; i < LANES; ++i)
    for (int64_t j = 0; j < LANES; ++j) {
      int32_t word;
      std::memcpy(&word, static_cast<const char*>(rows[j]) + i * sizeof(word), sizeof(word));
      columns[i][j] = word;
    }
#endif
}

inline IntVec rounded(Vec x) {  // to nearest even; without an addition that a compiler could fuse with a product x
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  __m256 from[2];
  std::memcpy(from, &x, sizeof(x));
  const __m256i to[2] = {_mm256_cvtps_epi32(from[0]), _mm256_cvtps_epi32(from[1])};
  IntVec y;
  std::memcpy(&y, to, sizeof(y));
  return y;
#else
  IntVec y;
  for (int64_t i = 0; i < LANES; ++i) y[i] = static_cast<int32_t>(std::lrint(x[i]));
  return y;
#endif
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

inline Vec power_of_two(IntVec n) {  // -126 <= n <= 127
  const IntVec bits = n + 127 << 23;
  Vec y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

struct Exponential {  // p * 2^n
  Vec p;
  IntVec n;
};

inline Exponential exponential_of(Vec x) {  // -89 <= x <= 89; error up to 2 units in the last place
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
  return {p * (r * r) + r + 1.0f, (bits & 0xffff) << 16 >> 16};
}

inline Vec exponential(Vec x) {  // x <= 0; 0 below -87
  const Vec low = splat(-87.0f);
  const IntVec dropped = x < low;
  const auto [p, n] = exponential_of(dropped ? low : x);
  const Vec y = p * power_of_two(n);
  return dropped ? Vec{} : y;
}

// `count` values as floats: x itself, or a copy in `buffer`
template <typename T>
const float* floats(const T* x, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return x;
  in_vectors(count, [&](int64_t k, auto read, auto write) { write(buffer + k, read(x + k)); });
  return buffer;
}

inline int64_t rows_of(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

}  // namespace
