// RMSNorm with the bits of PyTorch's operators: specdec::rms_norm, specdec::add_rms_norm.
#pragma once

#include <cmath>

#include "memory.h"
#include "vectors.h"

namespace {

typedef float Vec16 __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

// The sum of squares of x[0 … depth), at least a vector V, in the order of at::sum with such vectors: four sums of
// every fourth vector, each in levels (aten/src/ATen/native/cpu/SumKernel.cpp).
template <typename V>
float sum_of_squares(const float* x, int64_t depth) {
  constexpr int L = sizeof(V) / sizeof(float), LEVELS = 4, PARTS = 4;
  auto square = [&](int64_t index) {
    V v;
    std::memcpy(&v, x + index * L, sizeof(v));
    return v * v;
  };
  const int64_t vectors = depth / L, size = vectors / PARTS;
  int64_t log2 = 0;
  while ((int64_t{1} << log2) < size) ++log2;
  const int64_t power = std::max<int64_t>(4, log2 / LEVELS), step = int64_t{1} << power;
  V sums[LEVELS][PARTS] = {};
  int64_t i = 0;
  while (i + step <= size) {
    for (const int64_t stop = i + step; i < stop; ++i)
      for (int k = 0; k < PARTS; ++k) sums[0][k] += square(i * PARTS + k);
    for (int level = 1; level < LEVELS; ++level) {
      for (int k = 0; k < PARTS; ++k) sums[level][k] += sums[level - 1][k], sums[level - 1][k] = V{};
      if (i & (step - 1) << (level * power)) break;
    }
  }
  for (; i < size; ++i)
    for (int k = 0; k < PARTS; ++k) sums[0][k] += square(i * PARTS + k);
  for (int level = 1; level < LEVELS; ++level)
    for (int k = 0; k < PARTS; ++k) sums[0][k] += sums[level][k];
  for (int64_t rest = size * PARTS; rest < vectors; ++rest) sums[0][0] += square(rest);
  for (int k = 1; k < PARTS; ++k) sums[0][0] += sums[0][k];
  float total = 0.0f;
  for (int64_t k = vectors * L; k < depth; ++k) total += x[k] * x[k];
  for (int lane = 0; lane < L; ++lane) total += sums[0][0][lane];
  return total;
}

using SumOfSquares = float (*)(const float* x, int64_t depth);
constexpr int64_t MIN_DEPTH = 16, MAX_DEPTH = 1 << 15;  // at::sum splits longer rows by thread

// Whether sums / depth are the bits of at::mean on this machine, which depend on its vectors and on PyTorch's version.
inline bool is_mean_of_squares(SumOfSquares sum) {
  for (int64_t depth : {16, 40, 64, 72, 96, 128, 160, 250, 256, 576, 896, 1000, 2048, 3072, 4100, 5120, 8192, 20000})
    for (int64_t rows : {1, 3}) {
      Tensor x = at::empty({rows, depth}, at::kFloat);
      float* values = mutable_data<float>(x);
      uint32_t random = 1;
      for (int64_t i = 0; i < rows * depth; ++i) {
        random = random * 1664525 + 1013904223;
        values[i] = static_cast<float>(random >> 8) * 0x1p-23f - 1.0f;
      }
      const Tensor mean = at::mean(x * x, {-1});
      for (int64_t row = 0; row < rows; ++row)
        if (sum(values + row * depth, depth) / static_cast<float>(depth) != data<float>(mean)[row])
          return false;
    }
  return true;
}

inline SumOfSquares sum_of_squares_like_pytorch() {  // null where no order is PyTorch's
  static const SumOfSquares found = [] {
    const at::NoGradGuard no_gradients;
    for (SumOfSquares sum : {sum_of_squares<Vec16>, sum_of_squares<Vec8>, sum_of_squares<Vec4>})
      if (is_mean_of_squares(sum)) return sum;
    return SumOfSquares{nullptr};
  }();
  return found;
}

// One row: total = x + y, or x where y is null; out = weight * T(total / sqrt(mean(total * total) + eps)).
template <typename T>
void norm_row(SumOfSquares sum, const T* x, const T* y, const T* weight, float eps, int64_t depth, T* total, T* out) {
  float* values = scratch<float>(depth);
  in_vectors(depth, [&](int64_t k, auto read, auto write) {
    Vec v = read(x + k);
    if (y) write(total + k, v = rounded_to<T>(v + read(y + k)));
    write(values + k, v);
  });
  const float factor = 1.0f / std::sqrt(sum(values, depth) / static_cast<float>(depth) + eps);
  in_vectors(depth, [&](int64_t k, auto read, auto write) {
    write(out + k, read(weight + k) * rounded_to<T>(read(values + k) * factor));
  });
}

template <typename T>
void norm_rows(SumOfSquares sum, const Tensor& x, const Tensor* y, const Tensor& weight, double eps, Tensor& total,
    Tensor& out) {
  const int64_t depth = x.size(-1);
  const T *from = data<T>(x), *others = y ? data<T>(*y) : nullptr;
  const T* w = data<T>(weight);
  T *sums = mutable_data<T>(total), *to = mutable_data<T>(out);
  parallel_for(0, rows_of(x), std::max<int64_t>(1, WORK / (8 * depth)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * depth; at < end * depth; at += depth)
      norm_row<T>(sum, from + at, y ? others + at : nullptr, w, static_cast<float>(eps), depth, sums + at, to + at);
  });
}

// total: x + y, or x where y is null. -> the norm of it
Tensor norm_of_sum(const Tensor& x, const Tensor* y, const Tensor& weight, double eps, Tensor& total) {
  const auto dtype = x.scalar_type();
  const int64_t depth = x.size(-1);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.numel() == depth && weight.scalar_type() == dtype &&
                  (dtype == at::kFloat || dtype == at::kBFloat16),
      "rms_norm: contiguous x and weight of one dtype, float32 or bfloat16");
  TORCH_CHECK(!y || (y->is_contiguous() && y->sizes() == x.sizes() && y->scalar_type() == dtype),
      "add_rms_norm: x and y of one kind");
  const SumOfSquares sum = sum_of_squares_like_pytorch();
  if (!sum || depth < MIN_DEPTH || depth >= MAX_DEPTH) {
    if (y) total = x + *y;
    const Tensor values = total.to(at::kFloat);
    return weight * (values * at::rsqrt(at::mean(values.pow(2), {-1}, true) + eps)).to(dtype);
  }
  if (y) total = empty(x.sizes(), dtype);
  Tensor out = empty(x.sizes(), dtype);
  dtype == at::kFloat ? norm_rows<float>(sum, x, y, weight, eps, total, out)
                      : norm_rows<BFloat16>(sum, x, y, weight, eps, total, out);
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor rows = x.contiguous();
  return norm_of_sum(rows, nullptr, weight, eps, rows);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& y, const Tensor& weight, double eps) {
  const Tensor rows = x.contiguous(), others = y.contiguous();
  Tensor total;
  Tensor normed = norm_of_sum(rows, &others, weight, eps, total);
  return {total, normed};
}

}  // namespace
