// Dense linear layers: specdec::linear.
#pragma once

#include "memory.h"
#include "vectors.h"

namespace {

template <int R, int N, typename T>
void dots(const float* x, int64_t depth, const T* w, float* y, int64_t y_stride) {  // R rows of x times N rows of W
  Vec sums[R][N];
  clear(sums);
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Vec v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) v[n] = load(w + n * depth + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec value = load(x + r * depth + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(value, v[n], sums[r][n]);
    }
  }
  if (k < depth)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        sums[r][n] = multiply_add(load_some(x + r * depth + k, depth - k), load_some(w + n * depth + k, depth - k),
            sums[r][n]);
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
  constexpr int64_t MOST = LANES == 16 ? 4 : 2;  // that have their sums in registers
  for (int64_t row = 0; row < rows; row += MOST)
    in_rows<MOST>(std::min(MOST, rows - row),
        [&](auto R) { dots<R, N>(x + row * depth, depth, w, y + row * y_stride, y_stride); });
}

// y [M, N] in T = x [M, K] times W [N, K] in U; a row of W may have a scale, or a bias that is added to the rounded
// result.
template <typename T, typename U, typename S>
void linear_into(const T* x, int64_t rows, const Tensor& weight, const S* scale, const T* bias, T* y) {
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const U* w = data<U>(weight);
  const int64_t tiles = (columns + 3) / 4, grain = std::max<int64_t>(1, WORK / (depth * 4 * rows));
  // As many rows at a time as stay in the first cache. From MANY on, W is converted once for all of them.
  constexpr int64_t MANY = 16, FLOATS = 1 << 13;
  const int64_t chunk = std::max(MANY, FLOATS / depth / 4 * 4);
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    float *of_x = scratch<float, 1>(std::min(rows, chunk) * depth), *of_w = scratch<float, 2>(4 * depth),
          *sums = scratch<float, 3>(chunk * 4);
    for (int64_t top = 0; top < rows; top += chunk) {
      const int64_t height = std::min(chunk, rows - top);
      const float* in = floats(x + top * depth, height * depth, of_x);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * 4, count = std::min<int64_t>(4, columns - first);
        const U* from = w + first * depth;
        if (count == 4 && height >= MANY) {
          dots_of_rows<4>(in, height, depth, floats(from, 4 * depth, of_w), sums, 4);
        } else if (count == 4) {
          dots_of_rows<4>(in, height, depth, from, sums, 4);
        } else {
          for (int64_t n = 0; n < count; ++n) dots_of_rows<1>(in, height, depth, from + n * depth, sums + n, 4);
        }
        for (int64_t row = 0; row < height; ++row)
          for (int64_t n = 0; n < count; ++n) {
            const float sum = sums[row * 4 + n];
            const T value = static_cast<T>(scale ? sum * static_cast<float>(scale[first + n]) : sum);
            y[(top + row) * columns + first + n] =
                bias ? static_cast<T>(static_cast<float>(value) + static_cast<float>(bias[first + n])) : value;
          }
      }
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(0);
  Tensor y = empty(sizes, x.scalar_type());
  auto run = [&](auto of) {
    using T = decltype(of);
    linear_into<T, T, float>(data<T>(rows), rows_of(x), weight, nullptr,
        bias ? data<T>(*bias) : nullptr, mutable_data<T>(y));
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  return y;
}

}  // namespace
