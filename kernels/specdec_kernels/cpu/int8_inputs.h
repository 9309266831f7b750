// Inputs rounded to 8 bits by group, and products of bytes summed in int32: exact, so in any order.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t INPUT_GROUP = 64;  // columns of an input row that share a scale, at most

// Lane i: sums[i] + the sum of four products, of the unsigned bytes of a[i] and the signed bytes of b[i]. Two products
// of neighbors fit into int16: either a < 16 or |b| * a <= 127 * 127.
inline IntVec add_byte_products(IntVec sums, IntVec a, IntVec b) {
#if defined(SPECDEC_AVX512) && defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(SPECDEC_AVX512)
  return sums + (IntVec)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
#elif defined(SPECDEC_AVX2) && defined(__AVXVNNI__)
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(SPECDEC_AVX2)
  return sums + (IntVec)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)  // a < 128 as signed bytes
  int32x4_t s[LANES / 4];
  int8x16_t u[LANES / 4], v[LANES / 4];
  std::memcpy(s, &sums, sizeof(s));
  std::memcpy(u, &a, sizeof(u));
  std::memcpy(v, &b, sizeof(v));
  for (int i = 0; i < LANES / 4; ++i) s[i] = vdotq_s32(s[i], u[i], v[i]);
  std::memcpy(&sums, s, sizeof(s));
  return sums;
#else
  for (int i = 0; i < 4; ++i) sums += (a >> 8 * i & 0xff) * (b << 24 - 8 * i >> 24);
  return sums;
#endif
}

// As add_byte_products, with sums of two products in int16 where those of four take more instructions: of up to
// MOST_CODES vectors a of codes below 16, since 8 * 2 * 15 * 127 < 2^15. add_pairs gives the sums of two to `sums`.
#if defined(SPECDEC_AVX2) && !defined(__AVXVNNI__)
constexpr bool SUMS_PAIRS = true;

inline IntVec add_code_products(IntVec sums, IntVec a, IntVec b) {
  __m256i pairs = _mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
  asm("" : "+x"(pairs));  // GCC 12 would compute all products before the first sum, of which few fit into registers
  return (IntVec)pairs;
}

inline IntVec add_pairs(IntVec sums, IntVec pairs) {
  return sums + (IntVec)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
}
#else
constexpr bool SUMS_PAIRS = false;

inline IntVec add_code_products(IntVec sums, IntVec a, IntVec b) { return add_byte_products(sums, a, b); }
inline IntVec add_pairs(IntVec sums, IntVec pairs) { return sums + pairs; }
#endif
constexpr int64_t MOST_CODES = 8;

inline void store(int8_t* at, IntVec v) {  // the low bytes
#if defined(SPECDEC_AVX512)  // one instruction; GCC 12 makes many of the conversion below
  const Bytes bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(SPECDEC_AVX2)  // values of 8 bits, so that none is clamped
  const __m256i words = (__m256i)v;
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)),
                bytes = _mm_packs_epi16(halves, halves);
#else
  const Bytes bytes = __builtin_convertvector(v, Bytes);
#endif
  std::memcpy(at, &bytes, sizeof(Bytes));
}

// Of each eight lanes the even ones first.
template <typename V>
V by_parity(V v) {
  if constexpr (sizeof(V) == 64)
    return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  else
    return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
}

// Rows of inputs x = scale * values, in groups of `group` columns, 8, 16, 32 or 64, that divide the row's length.
// The arrays are scratch memory of the thread that makes them, so it has one object at a time.
struct Int8Inputs {
  int64_t rows, depth, group, groups;
  int8_t* values;  // [M, K], then TILE_ROWS rows of any content: the last tile may read them
  float* scales;   // [K / group, M], and TILE_ROWS of any content
  int32_t* sums;   // of the values of a group, as scales

  // x [M, K]. A group is scaled so that its largest magnitude is 127, and rounded to nearest even; with an infinity or
  // a NaN in it, its scale is NaN. is_by_parity: of each eight columns the even ones come first.
  template <typename T>
  Int8Inputs(const T* x, int64_t rows, int64_t depth, int64_t group, bool is_by_parity)
      : rows(rows), depth(depth), group(group), groups(depth / group),
        values(scratch<int8_t>((rows + TILE_ROWS) * depth)),
        scales(scratch<float>(rows * groups + TILE_ROWS)), sums(scratch<int32_t>(rows * groups + TILE_ROWS)) {
    parallel_for(0, rows, std::max<int64_t>(1, WORK / (4 * depth)), [&](int64_t begin, int64_t end) {
      is_by_parity ? round_rows<true>(x, begin, end) : round_rows<false>(x, begin, end);
    });
  }

 private:
  template <bool BY_PARITY, typename T>
  void round_rows(const T* x, int64_t begin, int64_t end) {
    switch (group) {
      case 8: return round_rows<8, BY_PARITY>(x, begin, end);
      case 16: return round_rows<16, BY_PARITY>(x, begin, end);
      case 32: return round_rows<32, BY_PARITY>(x, begin, end);
      case 64: return round_rows<64, BY_PARITY>(x, begin, end);
    }
    TORCH_CHECK(false, "Int8Inputs: groups of ", group);
  }

  template <int64_t G, bool BY_PARITY, typename T>
  void round_rows(const T* x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t g = 0; g < groups; ++g)
        round_group<G, BY_PARITY>(x + row * depth + g * G, values + row * depth + g * G, g * rows + row);
  }

  template <int64_t G, bool BY_PARITY, typename T>
  void round_group(const T* x, int8_t* to, int64_t index) {
    constexpr int64_t VECTORS = (G + LANES - 1) / LANES;
    constexpr int32_t INFINITE = 0x7f800000;
    Vec in[VECTORS];
    IntVec largest = {};  // magnitudes, as the integers of their bits: of these a NaN has the largest
    for (int64_t n = 0; n < VECTORS; ++n) {
      in[n] = G < LANES ? load_some(x, G) : load(x + n * LANES);
      IntVec magnitude;
      std::memcpy(&magnitude, &in[n], sizeof(magnitude));
      magnitude &= 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = maximum(largest);
    float top;
    std::memcpy(&top, &bits, sizeof(top));
    const bool is_finite = bits < INFINITE;
    const float inverse = is_finite && bits > 0 ? 127.0f / top : 0.0f;
    scales[index] = is_finite ? top / 127.0f : std::numeric_limits<float>::quiet_NaN();
    IntVec total = {};
    for (int64_t n = 0; n < VECTORS; ++n) {
      IntVec q = rounded(in[n] * inverse);
      total += q;
      if (BY_PARITY) q = by_parity(q);
      if constexpr (G < LANES) {
        int8_t bytes[LANES];
        store(bytes, q);
        std::memcpy(to, bytes, G);
      } else {
        store(to + n * LANES, q);
      }
    }
    sums[index] = sum(total);
  }
};

}  // namespace
