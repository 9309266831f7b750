// Linear layers on 8-bit weights with a scale a row, such as output heads: specdec::int8_linear.
//
// y = scale * sum over input groups of input scale * (sum of x * w), the inner sums in integers, on inputs rounded to 8
// bits; else y = scale * sum of x * w in float32.
#pragma once

#include "int8_inputs.h"
#include "linear.h"

namespace {

// The sums of each lane's four products, of signed bytes of w from -127 on.
inline IntVec signed_byte_products(IntVec w, IntVec x) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  const IntVec offset = splat(static_cast<int32_t>(0x80808080));  // its sum is computed once for all w
  return add_byte_products(-add_byte_products(IntVec{}, offset, x), w ^ offset, x);
#elif defined(__AVX2__)
  __m256i a[2], b[2];
  std::memcpy(a, &w, sizeof(a));
  std::memcpy(b, &x, sizeof(b));
  for (int i = 0; i < 2; ++i) {
    b[i] = _mm256_sign_epi8(b[i], a[i]);
    a[i] = _mm256_abs_epi8(a[i]);
  }
  std::memcpy(&w, a, sizeof(a));
  std::memcpy(&x, b, sizeof(b));
  return add_byte_products(IntVec{}, w, x);
#elif defined(__ARM_FEATURE_DOTPROD)
  return add_byte_products(IntVec{}, w, x);
#else
  IntVec sums = {};
  for (int i = 0; i < 4; ++i) sums += (w << 24 - 8 * i >> 24) * (x << 24 - 8 * i >> 24);
  return sums;
#endif
}

template <int G>
IntVec load_bytes(const int8_t* at) {  // G of them, then zeros
  IntVec v = {};
  std::memcpy(&v, at, G);
  return v;
}

// y [R, N] = R rows of inputs times N rows of W, without the scales of W; stride: from row to row of y; G: bytes of an
// input group
template <int R, int N, int G>
void dots(const Int8Inputs& x, int64_t row, const int8_t* w, float* y, int64_t stride) {
  const int8_t* values = x.values + row * x.depth;
  const float* scales = x.scales + row * x.groups;
  Vec sums[R][N] = {};
  for (int64_t g = 0; g < x.groups; ++g) {
    IntVec weights[N];
    for (int n = 0; n < N; ++n) weights[n] = load_bytes<G>(w + n * x.depth + g * G);
    for (int r = 0; r < R; ++r) {
      const IntVec in = load_bytes<G>(values + r * x.depth + g * G);
      const float scale = scales[r * x.groups + g];
      for (int n = 0; n < N; ++n)
        sums[r][n] += __builtin_convertvector(signed_byte_products(weights[n], in), Vec) * scale;
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
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) dots<4, N, G>(x, row, w, y + row * stride, stride);
  switch (rows - row) {
    case 1: dots<1, N, G>(x, row, w, y + row * stride, stride); break;
    case 2: dots<2, N, G>(x, row, w, y + row * stride, stride); break;
    case 3: dots<3, N, G>(x, row, w, y + row * stride, stride); break;
  }
}

template <int N>
void dots_of_rows(const Int8Inputs& x, int64_t rows, const int8_t* w, float* y, int64_t stride) {
  switch (x.group) {
    case 64: return dots_of_rows<N, 64>(x, rows, w, y, stride);
    case 32: return dots_of_rows<N, 32>(x, rows, w, y, stride);
    default: return dots_of_rows<N, 16>(x, rows, w, y, stride);
  }
}

template <typename T, typename S>
void int8_linear_into(const Tensor& x, const Tensor& weight, const S* scale, Tensor& y) {
  constexpr int64_t TILE = 4, BLOCK = 64;  // rows of W that share the reads of the inputs; of a task
  const int64_t rows = rows_of(x), depth = x.size(-1), columns = weight.size(0);
  const int8_t* w = data<int8_t>(weight);
  T* out = mutable_data<T>(y);
  const Int8Inputs inputs(data<T>(x), rows, depth, std::gcd(depth, INPUT_GROUP), false);
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
  TORCH_CHECK(x.size(-1) % LANES == 0, "int8_linear: rows of a multiple of 16 columns");
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
