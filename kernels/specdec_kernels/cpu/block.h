// Halves of a decoder layer of Llama's kind, each with the residual sum and the norm that follow it:
// specdec::attention_block, specdec::mlp_block.
//
// They call the functions of the single operators, so the bits are the same; what they save is a call, its checks and
// its memory for each of them, which take longer than the computation in a small model.
#pragma once

#include "attention.h"
#include "int4_linear.h"
#include "linear.h"
#include "norm.h"

namespace {

// y [M, N] of each weight = x [M, K] times it: weights in 4 bits, or dense ones where scales is empty.
template <typename T>
void project(const T* x, int64_t rows, int64_t depth, at::TensorList weights, at::TensorList scales,
    at::IntArrayRef columns, bool int8_inputs, std::initializer_list<T*> y) {
  if (!scales.empty()) return int4_linear_of<T>(x, rows, depth, weights, scales, columns, int8_inputs, y.begin());
  for (size_t i = 0; i < weights.size(); ++i)
    linear_into<T, T, float>(x, rows, weights[i], nullptr, nullptr, y.begin()[i]);
}

inline at::TensorList part(at::TensorList list, size_t first, size_t count) {  // an empty list stays empty
  return list.empty() ? list : list.slice(first, count);
}

inline Vec silu(Vec x) {
  const Vec limit = splat(89.0f), y = -x;
  const auto [p, n] = exponential_of(y > limit ? limit : y < -limit ? -limit : y);
  const IntVec half = n >> 1;  // 2^n may be beyond the largest float, which makes the sum infinite and the result 0
  return x / multiply_add(p * power_of_two(half), power_of_two(n - half), 1.0f);
}

// Whether silu has the bits of at::silu for every value of T; so many can be tried of bfloat16 alone.
template <typename T>
bool silu_is_pytorchs() {
  if constexpr (sizeof(T) != 2) return false;
  static const bool is_same = [] {
    const at::NoGradGuard no_gradients;
    constexpr int64_t COUNT = 1 << 16;
    Tensor x = at::empty({COUNT}, at::kBFloat16);
    auto* values = mutable_data<BFloat16>(x);
    for (int64_t i = 0; i < COUNT; ++i) values[i] = BFloat16(static_cast<uint16_t>(i), BFloat16::from_bits());
    const Tensor y = at::silu(x);
    for (int64_t i = 0; i < COUNT; i += LANES) {
      BFloat16 own[LANES];
      store(own, silu(load(values + i)));
      const BFloat16* theirs = data<BFloat16>(y) + i;
      for (int64_t k = 0; k < LANES; ++k) {
        const bool are_nan = std::isnan(static_cast<float>(own[k])) && std::isnan(static_cast<float>(theirs[k]));
        if (own[k].x != theirs[k].x && !are_nan) return false;
      }
    }
    return true;
  }();
  return is_same;
}

// gate [M, K] = silu(gate) * up
template <typename T>
void silu_product(T* gate, const T* up, int64_t rows, int64_t depth) {
  const bool is_own = silu_is_pytorchs<T>();
  if (!is_own) {
    Tensor all = at::from_blob(gate, {rows, depth}, c10::CppTypeToScalarType<T>::value);
    at::silu_(all);
  }
  parallel_for(0, rows, std::max<int64_t>(1, WORK / (16 * depth)), [&](int64_t begin, int64_t end) {
    in_vectors((end - begin) * depth, [&](int64_t k, auto read, auto write) {
      T* at = gate + begin * depth + k;
      const Vec x = read(at);
      write(at, (is_own ? rounded_to<T>(silu(x)) : x) * read(up + begin * depth + k));
    });
  });
}

void check_block(const Tensor& x, const Tensor& residual, at::TensorList weights, at::TensorList scales,
    at::IntArrayRef columns, size_t count) {
  TORCH_CHECK(x.is_contiguous() && residual.is_contiguous() && x.scalar_type() == residual.scalar_type() &&
                  rows_of(x) == rows_of(residual) && weights.size() == count && columns.size() == count &&
                  columns.back() == residual.size(-1) && (scales.empty() || scales.size() == count),
      "blocks: contiguous inputs of one kind, and lists of ", count);
  for (const Tensor& weight : weights)
    TORCH_CHECK(weight.is_contiguous() && (!scales.empty() || weight.scalar_type() == x.scalar_type()),
        "blocks: contiguous weights, dense ones in the inputs' dtype");
}

// weights: of query, key, value and output
std::tuple<Tensor, Tensor> attention_block(const Tensor& x, const Tensor& residual, at::TensorList weights,
    at::TensorList scales, at::IntArrayRef columns, bool int8_inputs, const Tensor& cos, const Tensor& sin,
    const Tensor& positions, const Tensor& intervals, Tensor keys, Tensor values, double scale, const Tensor& norm,
    double eps) {
  check_block(x, residual, weights, scales, columns, 4);
  const auto dtype = x.scalar_type();
  const auto c = cos.expect_contiguous(), s = sin.expect_contiguous(), p = positions.expect_contiguous(),
             i = intervals.expect_contiguous();
  const Rotary rotary{*c, *s, *p, *i, keys, values, scale};
  rotary.check(dtype, columns[0]);
  const int64_t rows = rows_of(x), heads = columns[0] / rotary.dim(), mixed = heads * rotary.value_dim();
  TORCH_CHECK(rows == rotary.rows() * rotary.width() && columns[1] == rotary.kv_heads() * rotary.dim() &&
                  columns[2] == rotary.kv_heads() * rotary.value_dim(),
      "attention_block: shapes do not match");
  Tensor y = empty(residual.sizes(), dtype), total;
  auto run = [&](auto of) {
    using T = decltype(of);
    Tensor memory = empty({rows * (columns[0] + columns[1] + columns[2] + mixed)}, dtype);
    T *query = mutable_data<T>(memory), *key = query + rows * columns[0], *value = key + rows * columns[1],
      *attended = value + rows * columns[2];
    project<T>(data<T>(x), rows, x.size(-1), weights.slice(0, 3), part(scales, 0, 3), columns.slice(0, 3),
        int8_inputs, {query, key, value});
    rotary_attention_of<T>(query, key, value, heads, rotary, attended);
    project<T>(attended, rows, mixed, weights.slice(3), part(scales, 3, 1), columns.slice(3), int8_inputs,
        {mutable_data<T>(y)});
  };
  dtype == at::kFloat ? run(float{}) : run(BFloat16{});
  Tensor normed = norm_of_sum(residual, &y, norm, eps, total);
  return {total, normed};
}

// weights: of gate, up and down
std::tuple<Tensor, Tensor> mlp_block(const Tensor& x, const Tensor& residual, at::TensorList weights,
    at::TensorList scales, at::IntArrayRef columns, bool int8_inputs, const Tensor& norm, double eps) {
  check_block(x, residual, weights, scales, columns, 3);
  const auto dtype = x.scalar_type();
  const int64_t rows = rows_of(x), depth = columns[0];
  TORCH_CHECK(columns[1] == depth, "mlp_block: shapes do not match");
  Tensor y = empty(residual.sizes(), dtype), total;
  auto run = [&](auto of) {
    using T = decltype(of);
    Tensor memory = empty({2 * rows * depth}, dtype);
    T *gate = mutable_data<T>(memory), *up = gate + rows * depth;
    project<T>(data<T>(x), rows, x.size(-1), weights.slice(0, 2), part(scales, 0, 2), columns.slice(0, 2),
        int8_inputs, {gate, up});
    silu_product(gate, up, rows, depth);
    project<T>(gate, rows, depth, weights.slice(2), part(scales, 2, 1), columns.slice(2), int8_inputs,
        {mutable_data<T>(y)});
  };
  dtype == at::kFloat ? run(float{}) : run(BFloat16{});
  Tensor normed = norm_of_sum(residual, &y, norm, eps, total);
  return {total, normed};
}

}  // namespace
