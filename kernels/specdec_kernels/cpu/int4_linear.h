// 4-bit linear layers: specdec::int4_linear.
#pragma once

#include "memory.h"
#include "w4a16.h"
#include "w4a8.h"

namespace {

constexpr int64_t CHUNK = 256;  // rows whose inputs are prepared at a time, so that they stay in the caches

template <typename T, typename S>
void int4_linear_of(const Tensor& x, at::TensorList packed, at::TensorList scales, at::IntArrayRef columns,
    bool int8_inputs, const std::vector<Tensor>& y) {
  const int64_t depth = x.size(-1), group = depth / scales[0].size(2);
  for (int64_t first = 0; first < rows_of(x); first += CHUNK) {
    const int64_t rows = std::min(CHUNK, rows_of(x) - first);
    const T* from = x.const_data_ptr<T>() + first * depth;
    c10::SmallVector<T*, 4> to;
    for (size_t i = 0; i < columns.size(); ++i) to.push_back(y[i].mutable_data_ptr<T>() + first * columns[i]);
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
void int4_linear_of(const Tensor& x, at::TensorList packed, at::TensorList scales, at::IntArrayRef columns,
    bool int8_inputs, const std::vector<Tensor>& y) {
  switch (scales[0].scalar_type()) {
    case at::kFloat: return int4_linear_of<T, float>(x, packed, scales, columns, int8_inputs, y);
    case at::kHalf: return int4_linear_of<T, Half>(x, packed, scales, columns, int8_inputs, y);
    default: return int4_linear_of<T, BFloat16>(x, packed, scales, columns, int8_inputs, y);
  }
}

std::vector<Tensor> int4_linear(const Tensor& x, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, bool int8_inputs) {
  TORCH_CHECK(packed.size() == columns.size() && scales.size() == columns.size() && !columns.empty(),
              "int4_linear: lists of one length");
  const Tensor rows = x.contiguous();
  std::vector<Tensor> y;
  for (size_t i = 0; i < columns.size(); ++i) {
    TORCH_CHECK(scales[i].size(2) == scales[0].size(2) && scales[i].scalar_type() == scales[0].scalar_type(),
                "int4_linear: weights of one kind");
    at::DimVector sizes(x.sizes());
    sizes.back() = columns[i];
    y.push_back(empty(sizes, x.scalar_type()));
  }
  if (x.scalar_type() == at::kFloat)
    int4_linear_of<float>(rows, packed, scales, columns, int8_inputs, y);
  else
    int4_linear_of<BFloat16>(rows, packed, scales, columns, int8_inputs, y);
  return y;
}

}  // namespace
