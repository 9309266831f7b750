// 4-bit linear layers: specdec::int4_linear.
#pragma once

#include "memory.h"
#include "w4a16.h"
#include "w4a8.h"

namespace {

constexpr int64_t CHUNK = 256;  // rows whose inputs are prepared at a time, so that they stay in the caches

// y [M, N] of each weight = x [M, K] times it
template <typename T, typename S>
void int4_linear_of(const T* x, int64_t num_rows, int64_t depth, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, bool int8_inputs, T* const* y) {
  const int64_t group = depth / scales[0].size(2);
  for (int64_t first = 0; first < num_rows; first += CHUNK) {
    const int64_t rows = std::min(CHUNK, num_rows - first);
    const T* from = x + first * depth;
    c10::SmallVector<T*, 4> to;
    for (size_t i = 0; i < columns.size(); ++i) to.push_back(y[i] + first * columns[i]);
    const int64_t work = depth * COLUMNS * rows;
    if (int8_inputs) {
      const Int8Inputs inputs(from, rows, depth, std::gcd(group, INPUT_GROUP), true);
      const int64_t task = rows < TILE_ROWS ? 4 * WORK : 8 * WORK;
      for_each_block<T, S>(rows, depth, packed, scales, columns, to, std::max<int64_t>(1, task / work),
          [&](const Block<S>& block, float* sums) { multiply_block(inputs, rows, block, sums); });
    } else {
      const RoundedInputs inputs(from, rows, depth, group);
      for_each_block<T, S>(rows, depth, packed, scales, columns, to, std::max<int64_t>(1, WORK / work),
          [&](const Block<S>& block, float* sums) { multiply_block(inputs, rows, block, sums); });
    }
  }
}

template <typename T>
void int4_linear_of(const T* x, int64_t rows, int64_t depth, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, bool int8_inputs, T* const* y) {
  TORCH_CHECK(packed.size() == columns.size() && scales.size() == columns.size() && !columns.empty(),
              "int4_linear: lists of one length");
  for (const Tensor& scale : scales)
    TORCH_CHECK(scale.size(2) == scales[0].size(2) && scale.scalar_type() == scales[0].scalar_type(),
                "int4_linear: weights of one kind");
  auto run = [&](auto of) {
    int4_linear_of<T, decltype(of)>(x, rows, depth, packed, scales, columns, int8_inputs, y);
  };
  switch (scales[0].scalar_type()) {
    case at::kFloat: return run(float{});
    case at::kHalf: return run(Half{});
    default: return run(BFloat16{});
  }
}

std::vector<Tensor> int4_linear(const Tensor& x, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, bool int8_inputs) {
  const Tensor rows = x.contiguous();
  std::vector<Tensor> y;
  for (int64_t count : columns) {
    at::DimVector sizes(x.sizes());
    sizes.back() = count;
    y.push_back(empty(sizes, x.scalar_type()));
  }
  auto run = [&](auto of) {
    using T = decltype(of);
    c10::SmallVector<T*, 4> to;
    for (Tensor& one : y) to.push_back(mutable_data<T>(one));
    int4_linear_of<T>(data<T>(rows), rows_of(x), x.size(-1), packed, scales, columns, int8_inputs,
        to.data());
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  return y;
}

}  // namespace
