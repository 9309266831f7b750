// 4-bit weights in blocks of columns of the result, as specdec_kernels.cpu.pack lays them out.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t COLUMNS = 64;  // of a block
constexpr int VECTORS = COLUMNS / LANES;
constexpr int64_t WORD = 8;      // codes of one column in an int32, the first in its lowest bits
constexpr int32_t SYMMETRIC_ZERO = 8;

constexpr int64_t ROWS = 8;      // of inputs that share a read of the weights

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

// The blocks of one weight [N, K], and the columns of y [M, N] that they give.
template <typename T, typename S>
struct Blocks {
  Block<S> first;
  int64_t words, scales;  // from block to block
  int64_t columns, first_index;  // N; the first block's index among those of all weights
  T* y;
};

// Calls multiply(block, sums [rows, 64]) for each block of weights with the same input, on all threads, and writes what
// it has put into sums to rows of y, [rows, N] of each weight. grain: blocks of one thread, at least.
template <typename T, typename S, typename Multiply>
void for_each_block(int64_t rows, int64_t depth, at::TensorList packed, at::TensorList scales,
    at::IntArrayRef columns, const c10::SmallVector<T*, 4>& y, int64_t grain, const Multiply& multiply) {
  const int64_t groups = scales[0].size(2);
  c10::SmallVector<Blocks<T, S>, 4> weights;
  int64_t blocks = 0;
  for (size_t i = 0; i < columns.size(); ++i) {
    const int64_t count = scales[i].size(1);
    const S* scale = data<S>(scales[i]);
    const S* offset = scales[i].size(0) == 2 ? scale + count * groups * COLUMNS : nullptr;
    weights.push_back({{data<int32_t>(packed[i]), scale, offset, depth / groups}, depth / WORD * COLUMNS,
                       groups * COLUMNS, columns[i], blocks, y[i]});
    blocks += count;
  }
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    float* sums = scratch<float, 1>((rows + TILE_ROWS) * COLUMNS);
    for (int64_t index = begin; index < end; ++index) {
      const Blocks<T, S>* weight = &weights.back();
      while (weight->first_index > index) --weight;
      const int64_t number = index - weight->first_index, first = number * COLUMNS,
                    count = std::min(COLUMNS, weight->columns - first);
      Block<S> block = weight->first;
      block.words += number * weight->words;
      block.scale += number * weight->scales;
      if (block.offset) block.offset += number * weight->scales;
      multiply(block, sums);
      for (int64_t row = 0; row < rows; ++row)
        store(weight->y + row * weight->columns + first, sums + row * COLUMNS, count);
    }
  });
}

}  // namespace
