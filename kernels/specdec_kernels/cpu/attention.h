// Attention over a ragged KV cache: specdec::attention.
#pragma once

#include "vectors.h"

namespace {

struct Cache {  // of the keys or values of one row and head
  int64_t stride, dim;
};

// N vectors of each of R weighted sums of values
template <int R, int N, typename T>
void mix(const float* weights, int64_t capacity, const T* values, Cache v, int64_t num_slots, const float* total,
    float* y) {
  Vec sums[R][N] = {};
  for (int64_t j = 0; j < num_slots; ++j)
    for (int n = 0; n < N; ++n) {
      const Vec value = load(values + j * v.stride + n * LANES);
      for (int r = 0; r < R; ++r) sums[r][n] += weights[r * capacity + j] * value;
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(y + r * v.dim + n * LANES, sums[r][n] / total[r]);
}

// R queries of one row and one key head, over the slots that any of them attends to. Slots that a query does not attend
// to have the weight 0 in its sum.
template <int R, typename T>
void attend(const float* x, const T* keys, Cache k, const T* values, Cache v, const int64_t* first,
    const int64_t* stop, float* y) {
  int64_t start = std::numeric_limits<int64_t>::max(), end = 0;
  for (int r = 0; r < R; ++r)
    if (first[r] < stop[r]) start = std::min(start, first[r]), end = std::max(end, stop[r]);
  const int64_t num_slots = std::max<int64_t>(0, end - start);
  if (num_slots == 0) start = 0;
  const int64_t capacity = num_slots + 2 * LANES;
  std::vector<float> scores(R * capacity);
  for (int64_t j = 0; j < num_slots; j += 4) {
    const T* four[4];  // keys; beyond the last slot the last key is repeated
    for (int64_t i = 0; i < 4; ++i) four[i] = keys + (start + std::min(j + i, num_slots - 1)) * k.stride;
    Vec dots[R][4] = {};
    int64_t d = 0;
    for (; d + LANES <= k.dim; d += LANES) {
      Vec part[4];
      for (int i = 0; i < 4; ++i) part[i] = load(four[i] + d);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) dots[r][i] += load(x + r * k.dim + d) * part[i];
    }
    if (d < k.dim)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i)
          dots[r][i] += load_some(x + r * k.dim + d, k.dim - d) * load_some(four[i] + d, k.dim - d);
    for (int r = 0; r < R; ++r) {
      const Four sums = sums_of(dots[r]);
      std::memcpy(&scores[r * capacity + j], &sums, sizeof(sums));
    }
  }
  float total[R];
  for (int r = 0; r < R; ++r) {
    float* row = &scores[r * capacity];
    const bool has_slots = first[r] < stop[r];
    const int64_t from = has_slots ? first[r] - start : 0, to = has_slots ? stop[r] - start : 0;
    std::fill(row, row + from, 0.0f);
    std::fill(row + to, row + capacity, -std::numeric_limits<float>::infinity());
    Vec top = splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = from; j < to; j += LANES) {
      const Vec some = load(row + j);
      top = some > top ? some : top;
    }
    float largest = top[0];
    for (int64_t i = 1; i < LANES; ++i) largest = std::max(largest, top[i]);
    Vec sums = {};
    for (int64_t j = from; j < to; j += LANES) {
      const Vec p = exponential(load(row + j) - largest);
      store(row + j, p);
      sums += p;
    }
    std::fill(row + to, row + capacity, 0.0f);
    total[r] = to > from ? sum(sums) : 1.0f;
  }
  int64_t d = 0;
  values += start * v.stride;
  for (; d + 4 * LANES <= v.dim; d += 4 * LANES)
    mix<R, 4>(scores.data(), capacity, values + d, v, num_slots, total, y + d);
  for (; d + LANES <= v.dim; d += LANES) mix<R, 1>(scores.data(), capacity, values + d, v, num_slots, total, y + d);
  if (d < v.dim)
    for (int r = 0; r < R; ++r) {
      Vec sums = {};
      for (int64_t j = 0; j < num_slots; ++j)
        sums += scores[r * capacity + j] * load_some(values + j * v.stride + d, v.dim - d);
      sums /= total[r];
      std::memcpy(y + r * v.dim + d, &sums, (v.dim - d) * sizeof(float));
    }
}

template <typename T>
void attention_into(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first,
    const Tensor& last, double scale, Tensor& y) {
  const int64_t heads = query.size(1), width = query.size(2), dim = query.size(3), value_dim = value.size(3),
      slots = key.size(2);
  const int64_t kv_heads = key.size(1), group = heads / kv_heads, queries = group * width, units = (queries + 3) / 4;
  const T *q = query.const_data_ptr<T>(), *k = key.const_data_ptr<T>(), *v = value.const_data_ptr<T>();
  const int32_t *from = first.const_data_ptr<int32_t>(), *to = last.const_data_ptr<int32_t>();
  T* out = y.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, WORK / std::max<int64_t>(1, 4 * slots * dim));
  at::parallel_for(0, query.size(0) * kv_heads * units, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> x(4 * dim), mixed(4 * value_dim);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / (kv_heads * units), kv_head = index / units % kv_heads, unit = index % units * 4;
      const int64_t count = std::min<int64_t>(4, queries - unit);
      int64_t starts[4], stops[4];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        const T* own = q + row * query.stride(0) + head * query.stride(1) + column * query.stride(2);
        for (int64_t d = 0; d < dim; ++d) x[i * dim + d] = static_cast<float>(own[d]) * static_cast<float>(scale);
        starts[i] = std::max<int64_t>(0, from[row * width + column]);
        stops[i] = std::min<int64_t>(slots, to[row * width + column] + 1);
      }
      const T* keys = k + row * key.stride(0) + kv_head * key.stride(1);
      const T* values = v + row * value.stride(0) + kv_head * value.stride(1);
      const Cache of_keys{key.stride(2), dim}, of_values{value.stride(2), value_dim};
      switch (count) {
        case 1: attend<1>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        case 2: attend<2>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        case 3: attend<3>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data()); break;
        default: attend<4>(x.data(), keys, of_keys, values, of_values, starts, stops, mixed.data());
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        T* at = out + ((row * width + column) * heads + head) * value_dim;
        for (int64_t d = 0; d < value_dim; ++d) at[d] = static_cast<T>(mixed[i * value_dim + d]);
      }
    }
  });
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first, const Tensor& last,
    double scale) {
  const auto dtype = query.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    return attention(query.to(at::kFloat), key.to(at::kFloat), value.to(at::kFloat), first, last, scale).to(dtype);
  Tensor y = at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, query.options());
  Tensor from = first.contiguous(), to = last.contiguous();
  dtype == at::kFloat ? attention_into<float>(query, key, value, from, to, scale, y)
                      : attention_into<BFloat16>(query, key, value, from, to, scale, y);
  return y;
}

}  // namespace
