// 4-bit weights in blocks of columns of the result, as specdec_kernels.cpu.pack lays them out.
#pragma once

#include "vectors.h"

namespace {

constexpr int VECTORS = 4;       // of columns in a block
constexpr int64_t COLUMNS = VECTORS * LANES;
constexpr int64_t WORD = 8;      // codes of one column in an int32, the first in its lowest bits
constexpr int32_t SYMMETRIC_ZERO = 8;

template <typename S>
struct Block {  // 64 columns of a weight: word [K / 8, 64], scale and offset [K / group, 64]
  const int32_t* words;
  const S *scale, *offset;  // offset: 8 - zero; null if all zero points are 8
  int64_t group;

  Vec scale_of(int64_t g, int64_t n) const { return load(scale + g * COLUMNS + n); }
  Vec zero_of(int64_t g, int64_t n) const {
    return SYMMETRIC_ZERO - (offset ? load(offset + g * COLUMNS + n) : Vec{});
  }
};

// Calls multiply(block, sums [rows, 64]) for each block of weights with the same input, on all threads, and writes what
// it has put into sums to rows of y, [rows, N] of each weight. grain: blocks of one thread, at least.
template <typename T, typename S, typename Multiply>
void for_each_block(int64_t rows, int64_t depth, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, std::vector<T*> y, int64_t grain, const Multiply& multiply) {
  std::vector<int64_t> first_blocks;
  int64_t blocks = 0;
  for (const Tensor& scale : scales) {
    first_blocks.push_back(blocks);
    blocks += scale.size(1);
  }
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    float* sums = scratch<float, 1>(rows * COLUMNS);
    for (int64_t index = begin; index < end; ++index) {
      size_t i = columns.size() - 1;
      while (first_blocks[i] > index) --i;
      const int64_t block = index - first_blocks[i], groups = scales[i].size(2), first = block * COLUMNS,
                    count = std::min(COLUMNS, columns[i] - first);
      const S* scale = scales[i].const_data_ptr<S>() + block * groups * COLUMNS;
      const S* offset = scales[i].size(0) == 2 ? scale + scales[i].size(1) * groups * COLUMNS : nullptr;
      const int32_t* words = packed[i].const_data_ptr<int32_t>() + block * (depth / WORD) * COLUMNS;
      multiply(Block<S>{words, scale, offset, depth / groups}, sums);
      for (int64_t row = 0; row < rows; ++row)
        store(y[i] + row * columns[i] + first, sums + row * COLUMNS, count);
    }
  });
}

}  // namespace
