// Vectors in GCC's and clang's extensions, as wide as the CPU's: GCC keeps wider ones in memory, not in registers.
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
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SPECDEC_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define SPECDEC_AVX2
#endif
#if defined(SPECDEC_AVX512) || defined(SPECDEC_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "threads.h"

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;

#ifdef SPECDEC_AVX512
constexpr int64_t LANES = 16;  // numbers of 32 bits in a vector
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t TILE_ROWS = 16;  // of a matrix in AMX's registers: scratch arrays hold as many rows beyond M
constexpr int64_t WORK = 1 << 16;  // multiplications of one task of a thread: one or two microseconds

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

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

// x * y + z in one rounding where the CPU can. Everywhere else products and sums are rounded apart (-ffp-contract=off),
// since which ones a compiler fuses depends on the loop around them, and so on the number of rows.
inline Vec multiply_add(Vec x, Vec y, Vec z) {
#if defined(SPECDEC_AVX512)
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(SPECDEC_AVX2)
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
  float32x4_t a[LANES / 4], b[LANES / 4], c[LANES / 4];
  std::memcpy(a, &x, sizeof(x));
  std::memcpy(b, &y, sizeof(y));
  std::memcpy(c, &z, sizeof(z));
  for (int64_t i = 0; i < LANES / 4; ++i) c[i] = vfmaq_f32(c[i], a[i], b[i]);
  std::memcpy(&z, c, sizeof(z));
  return z;
#else
  return x * y + z;
#endif
}

inline Vec multiply_add(Vec x, float y, Vec z) { return multiply_add(x, splat(y), z); }
inline Vec multiply_add(Vec x, Vec y, float z) { return multiply_add(x, y, splat(z)); }
inline Vec multiply_add(Vec x, float y, float z) { return multiply_add(x, splat(y), splat(z)); }

inline Vec load(const float* at) {
  Vec v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}

inline Words load_words(const void* at) {  // numbers of 16 bits
#if defined(SPECDEC_AVX512)  // one instruction; GCC 12 makes several of the conversion below
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
#elif defined(SPECDEC_AVX2)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
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
#ifdef SPECDEC_AVX2
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#endif
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
#if defined(SPECDEC_AVX512)
  const Halves h = (Halves)_mm512_cvtepi32_epi16((__m512i)nearest);
#elif defined(SPECDEC_AVX2)
  const __m256i words = (__m256i)nearest;
  const Halves h = (Halves)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
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

// Memory of this thread for `count` values of any content, until its next call for the same T and USE; aligned, so that
// a vector is in one line of the caches.
template <typename T, int USE = 0>
T* scratch(int64_t count) {
  static thread_local std::vector<T> memory;
  constexpr size_t LINE = 64;
  const size_t size = count * sizeof(T), space = size + LINE;
  if (memory.size() * sizeof(T) < space) memory.resize(space / sizeof(T));
  void* at = memory.data();
  size_t left = space;
  return static_cast<T*>(std::align(LINE, size, at, left));
}

// Calls f(R) with the number of rows, 1 … MOST, at compile time.
template <int64_t MOST, typename F>
void in_rows(int64_t rows, F f) {
  if constexpr (MOST > 1)
    if (rows < MOST) return in_rows<MOST - 1>(rows, f);
  f(std::integral_constant<int, MOST>());
}

// Zeros, in registers: GCC 12 writes an array = {} to memory, in an instruction of fifty cycles.
template <typename V, size_t R, size_t N>
[[gnu::always_inline]] inline void clear(V (&sums)[R][N]) {
#pragma GCC unroll 16
  for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (size_t n = 0; n < N; ++n) sums[r][n] = V{};
}

inline IntVec splat(int32_t x) { return x - IntVec{}; }

inline IntVec splat_word(const int8_t* at) {  // four bytes
#ifdef SPECDEC_AVX2  // in one instruction: GCC 12 reads two words together and takes them apart
  return (IntVec)_mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(at)));
#else
  int32_t word;
  std::memcpy(&word, at, sizeof(word));
  return splat(word);
#endif
}

// f of all lanes: of halves with halves, in a fixed order; the result is in the first two lanes, to be combined by f.
template <typename V, typename F>
V halved(V v, F f) {
  if constexpr (sizeof(V) == 64) {
    v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    return f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  } else {
    v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    return f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1));
  }
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

// columns[i][j] = word i of rows[j]: as many rows and words as a vector has lanes
inline void transpose(const void* const* rows, IntVec* columns) {
#if defined(SPECDEC_AVX512)
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
#elif defined(SPECDEC_AVX2)
  __m256i row[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_si256(static_cast<const __m256i*>(rows[i]));
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    columns[i] = (IntVec)_mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    columns[i + 4] = (IntVec)_mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
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

inline IntVec rounded(Vec x) {  // to nearest even
#if defined(SPECDEC_AVX512)
  return (IntVec)_mm512_cvtps_epi32((__m512)x);
#elif defined(SPECDEC_AVX2)
  return (IntVec)_mm256_cvtps_epi32((__m256)x);
#else
  IntVec y;
  for (int64_t i = 0; i < LANES; ++i) y[i] = static_cast<int32_t>(std::lrint(x[i]));
  return y;
#endif
}

typedef float Four __attribute__((vector_size(16)));

template <typename V>
Four sums_of(const V* v) {  // the sums of four vectors, each in the order of sum()
  if constexpr (sizeof(V) == 64) {
    auto halves = [](V a, V b) {
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    V a = halves(v[0], v[1]), b = halves(v[2], v[3]);
    V w = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    w += __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    w += __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(w, w, 0, 4, 8, 12);
  } else {
    auto halves = [](V a, V b) {
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    };
    const V a = halves(v[0], v[1]), b = halves(v[2], v[3]);
    const V w = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) +
                __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
    return __builtin_shufflevector(w, w, 0, 2, 4, 6) + __builtin_shufflevector(w, w, 1, 3, 5, 7);
  }
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
  Vec n = multiply_add(x, 1.44269504f, 12582912.0f);  // adding and subtracting 1.5 * 2^23 rounds to an integer
  IntVec bits;
  std::memcpy(&bits, &n, sizeof(n));
  n -= 12582912.0f;
  Vec r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  return {multiply_add(p, r * r, r) + 1.0f, (bits & 0xffff) << 16 >> 16};
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
