// Inputs rounded to 8 bits by group, and products of bytes summed in int32: exact, so in any order.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t INPUT_GROUP = 64;  // columns of an input row that share a scale, at most

// Lane i: sums[i] + the sum of four products, of the unsigned bytes of a[i] and the signed bytes of b[i]. Two products
// of neighbors fit into int16: either a < 16 or |b| * a <= 127 * 127.
inline IntVec add_byte_products(IntVec sums, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  __m256i s[2], u[2], v[2];
  std::memcpy(s, &sums, sizeof(s));
  std::memcpy(u, &a, sizeof(u));
  std::memcpy(v, &b, sizeof(v));
  for (int i = 0; i < 2; ++i) {
#if defined(__AVXVNNI__)
    s[i] = _mm256_dpbusd_avx_epi32(s[i], u[i], v[i]);
#else
    s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(u[i], v[i]), _mm256_set1_epi16(1)));
#endif
  }
  std::memcpy(&sums, s, sizeof(s));
  return sums;
#elif defined(__ARM_FEATURE_DOTPROD)  // a < 128 as signed bytes
  int32x4_t s[4];
  int8x16_t u[4], v[4];
  std::memcpy(s, &sums, sizeof(s));
  std::memcpy(u, &a, sizeof(u));
  std::memcpy(v, &b, sizeof(v));
  for (int i = 0; i < 4; ++i) s[i] = vdotq_s32(s[i], u[i], v[i]);
  std::memcpy(&sums, s, sizeof(s));
  return sums;
#else
  for (int i = 0; i < 4; ++i) sums += (a >> 8 * i & 0xff) * (b << 24 - 8 * i >> 24);
  return sums;
#endif
}

// Rows of inputs x = scale * values, in groups of `group` columns, a multiple of 8 that divides the row's length.
struct Int8Inputs {
  int64_t depth, group, groups;
  int8_t* values;  // [M, K]; all three are this thread's scratch memory, so one object at a time
  float* scales;   // [M, K / group]
  int32_t* sums;   // [M, K / group], of the values

  // x [M, K]. A group is scaled so that its largest magnitude is 127, and rounded to nearest even; with an infinity or
  // a NaN in it, its scale is NaN. by_parity: of each eight columns the even ones come first.
  template <typename T>
  Int8Inputs(const T* x, int64_t rows, int64_t depth, int64_t group, bool by_parity)
      : depth(depth), group(group), groups(depth / group), values(scratch<int8_t>(rows * depth)),
        scales(scratch<float>(rows * groups)), sums(scratch<int32_t>(rows * groups)) {
    for (int64_t i = 0; i < rows * groups; ++i) {
      const T* from = x + i * group;
      int8_t* to = values + i * group;
      Vec largest = {}, zeros = {};
      int64_t k = 0;
      for (; k < group; k += LANES) {
        const Vec v = group - k < LANES ? load_some(from + k, group - k) : load(from + k);
        const Vec magnitude = v < 0 ? -v : v;
        largest = magnitude > largest ? magnitude : largest;
        zeros += v * 0.0f;
      }
      const float top = maximum(largest), inverse = top > 0 ? 127.0f / top : 0.0f;
      scales[i] = top / 127.0f + sum(zeros);
      IntVec total = {};
      for (k = 0; k < group; k += LANES) {
        const int64_t count = std::min(LANES, group - k);
        const Vec v = count < LANES ? load_some(from + k, count) : load(from + k);
        IntVec q = rounded(v * inverse);
        total += q;
        if (by_parity)
          q = __builtin_shufflevector(q, q, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        const Bytes bytes = __builtin_convertvector(q, Bytes);
        std::memcpy(to + k, &bytes, count);
      }
      sums[i] = sum(total);
    }
  }
};

}  // namespace
