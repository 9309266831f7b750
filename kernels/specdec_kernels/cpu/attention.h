// Attention over a ragged KV cache, and rotary embedding: specdec::attention, rotary_attention, cos_sin.
#pragma once

#include "attention_tiles.h"
#include "memory.h"

#if defined(__linux__)  // of this thread -> the number before; null where PyTorch has no MKL
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
#endif

namespace {

constexpr int64_t MOST_QUERIES = 32;  // that are computed together

// N vectors of each of R weighted sums of values
template <int R, int N, typename T>
void mix(const float* weights, int64_t capacity, const T* values, Cache v, int64_t num_slots, const float* total,
    float* y) {
  Vec sums[R][N];
  clear(sums);
  for (int64_t j = 0; j < num_slots; ++j)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Vec value = load(values + j * v.stride + n * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][n] = multiply_add(value, weights[r * capacity + j], sums[r][n]);
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(y + r * v.dim + n * LANES, sums[r][n] / total[r]);
}

// A vector of keys as floats: dimension d of each at to + d * LANES; from key `last` on, they are that one. Zeros follow
// the last dimension, up to a multiple of 2 * LANES.
template <typename T>
void transpose_keys(const T* keys, Cache k, int64_t last, float* to) {
  constexpr int64_t STEP = sizeof(IntVec) / sizeof(T);
  const void* rows[LANES];
  for (int64_t i = 0; i < LANES; ++i) rows[i] = keys + std::min(i, last) * k.stride;
  for (int64_t d = 0; d < k.dim; d += STEP) {
    IntVec padded[LANES], columns[LANES];
    if (k.dim - d < STEP)
      for (int64_t i = 0; i < LANES; ++i) {
        padded[i] = IntVec{};
        rows[i] = std::memcpy(&padded[i], rows[i], (k.dim - d) * sizeof(T));
      }
    transpose(rows, columns);
    for (int64_t i = 0; i < LANES; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        store(to + (d + i) * LANES, (Vec)columns[i]);
      } else {  // two in a word
        store(to + (d + 2 * i) * LANES, (Vec)(columns[i] << 16));
        store(to + (d + 2 * i + 1) * LANES, (Vec)(columns[i] & static_cast<int32_t>(0xffff0000)));
      }
      rows[i] = static_cast<const T*>(rows[i]) + STEP;
    }
  }
}

// Scores of R queries x [R, depth] and a vector of keys, the sums of even and odd dimensions apart; depth is even.
template <int R>
void score(const float* x, int64_t depth, const float* keys, int64_t capacity, float* scores) {
  Vec sums[R][2];  // of even and of odd dimensions
  clear(sums);
  for (int64_t d = 0; d < depth; d += 2) {
    const Vec even = load(keys + d * LANES), odd = load(keys + (d + 1) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sums[r][0] = multiply_add(even, x[r * depth + d], sums[r][0]);
      sums[r][1] = multiply_add(odd, x[r * depth + d + 1], sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(scores + r * capacity, sums[r][0] + sums[r][1]);
}

// Calls f(R, first) for each block of queries first … first + R - 1 of `count`, with R at compile time.
template <typename F>
void in_blocks(int64_t count, F f) {
  int64_t first = 0;
  constexpr int64_t MOST = LANES == 16 ? 8 : 4;  // that have their sums in registers
  if constexpr (MOST == 8)
    for (; count - first >= 8; first += 8) f(std::integral_constant<int, 8>(), first);
  for (; count - first >= 4; first += 4) f(std::integral_constant<int, 4>(), first);
  switch (count - first) {
    case 1: f(std::integral_constant<int, 1>(), first); break;
    case 2: f(std::integral_constant<int, 2>(), first); break;
    case 3: f(std::integral_constant<int, 3>(), first); break;
  }
}

// Scores of the slots from … to - 1 -> their exponentials, by which the greatest one has 1, and their sum.
inline float weigh(float* scores, int64_t from, int64_t to) {
  Vec top = splat(-std::numeric_limits<float>::infinity());
  store(scores + to, top);  // the rest of the last vector
  for (int64_t j = from; j < to; j += LANES) {
    const Vec some = load(scores + j);
    top = some > top ? some : top;
  }
  const float largest = maximum(top);
  Vec sums = {};
  for (int64_t j = from; j < to; j += LANES) {
    const Vec p = exponential(load(scores + j) - largest);
    store(scores + j, p);
    sums += p;
  }
  return sum(sums);
}

// y [count, v.dim] of queries [count] of one row and one key head, k.dim numbers each, over the slots that any of them
// attends to. Slots that a query does not attend to have the weight 0 in its sum.
template <typename T>
void attend(const T* const* queries, int64_t count, const T* keys, Cache k, const T* values, Cache v,
    const Slots& slots, float scale, float* y) {
  const auto& [first, stop, start, end] = slots;
  const int64_t num_slots = end - start, depth = k.dim + k.dim % 2;  // of the queries, padded with zeros
  float* x = scratch<float, 1>(count * depth);
  for (int64_t i = 0; i < count; ++i) {
    if (depth > k.dim) x[i * depth + k.dim] = 0.0f;
    in_vectors(k.dim,
        [&](int64_t d, auto read, auto write) { write(x + i * depth + d, read(queries[i] + d) * scale); });
  }
  const int64_t capacity = (num_slots + 2 * LANES) / LANES * LANES;
  float *scores = scratch<float>(count * capacity), *transposed = scratch<float, 3>((depth + 2 * LANES) * LANES);
  for (int64_t j = 0; j < num_slots; j += LANES) {
    transpose_keys(keys + (start + j) * k.stride, k, num_slots - j - 1, transposed);
    in_blocks(count, [&](auto R, int64_t i) {
      score<R>(x + i * depth, depth, transposed, capacity, scores + i * capacity + j);
    });
  }
  float total[MOST_QUERIES];
  for (int64_t i = 0; i < count; ++i) {
    float* row = scores + i * capacity;
    const bool has_slots = first[i] < stop[i];
    const int64_t from = has_slots ? first[i] - start : 0, to = has_slots ? stop[i] - start : 0;
    total[i] = has_slots ? weigh(row, from, to) : 1.0f;
    std::fill(row, row + from, 0.0f);
    std::fill(row + to, row + std::max(to, num_slots), 0.0f);
  }
  values += start * v.stride;
  in_blocks(count, [&](auto R, int64_t i) {
    constexpr int N = R > (LANES == 16 ? 4 : 2) ? 2 : 4;  // vectors of values: as many sums as there are registers
    const float* weights = scores + i * capacity;
    float* to = y + i * v.dim;
    int64_t d = 0;
    for (; d + N * LANES <= v.dim; d += N * LANES)
      mix<R, N>(weights, capacity, values + d, v, num_slots, total + i, to + d);
    for (; d + LANES <= v.dim; d += LANES) mix<R, 1>(weights, capacity, values + d, v, num_slots, total + i, to + d);
    for (int r = 0; r < R && d < v.dim; ++r) {
      Vec sums = {};
      for (int64_t j = 0; j < num_slots; ++j)
        sums = multiply_add(load_some(values + j * v.stride + d, v.dim - d), weights[r * capacity + j], sums);
      store_some(to + r * v.dim + d, sums / total[i + r], v.dim - d);
    }
  });
}

// Queries [B, H, W, D]: strides of the first three dimensions; the last is contiguous.
template <typename T>
struct Queries {
  const T* at;
  int64_t row_stride, head_stride, column_stride, heads, width;
};

// first, last: of row b and column w at b * interval_stride + w.
template <typename T>
void attention_into(const Queries<T>& query, const Tensor& key, const Tensor& value, const int32_t* first,
    const int32_t* last, int64_t interval_stride, double scale, T* out) {
  const int64_t heads = query.heads, width = query.width, dim = key.size(3), value_dim = value.size(3),
      slots = key.size(2);
  const int64_t rows = key.size(0), kv_heads = key.size(1), group = heads / kv_heads, queries = group * width;
  const T *k = data<T>(key), *v = data<T>(value);
  int64_t work = 0;  // of all threads
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; ++column) {
      const int64_t at = row * interval_stride + column;
      work += std::clamp<int64_t>(last[at] - first[at] + 1, 1, slots) * heads * (dim + value_dim);
    }
#ifdef SPECDEC_ATTENTION_TILES
  const bool in_tiles = std::is_same_v<T, BFloat16> && attention_uses_tiles(dim, value_dim, scale);
#else
  const bool in_tiles = false;
#endif
  const int64_t per_thread = rows * kv_heads * queries / at::get_num_threads();
  const int64_t most = in_tiles ? LANES  // of a unit; else two units a thread, or more
                                : std::clamp<int64_t>(per_thread / 8 * 4, 4, MOST_QUERIES);
  const int64_t units = (queries + most - 1) / most, all = rows * kv_heads * units;
  parallel_for(0, all, 1 + all * WORK / (work + 1), [&](int64_t begin, int64_t end) {
    float* mixed = scratch<float, 4>(most * value_dim);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / (kv_heads * units), kv_head = index / units % kv_heads, number = index % units;
      // From both ends in turn: the last columns of a prompt attend to the most slots, and threads get equal work.
      const int64_t unit = (number % 2 ? units - 1 - number / 2 : number / 2) * most;
      const int64_t count = std::min(most, queries - unit);
      const T* own[MOST_QUERIES];
      int64_t starts[MOST_QUERIES], stops[MOST_QUERIES];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        own[i] = query.at + row * query.row_stride + head * query.head_stride + column * query.column_stride;
        starts[i] = std::max<int64_t>(0, first[row * interval_stride + column]);
        stops[i] = std::min<int64_t>(slots, last[row * interval_stride + column] + 1);
      }
      const T* keys = k + row * key.stride(0) + kv_head * key.stride(1);
      const T* values = v + row * value.stride(0) + kv_head * value.stride(1);
      const Cache of_keys{key.stride(2), dim}, of_values{value.stride(2), value_dim};
      const Slots attended(starts, stops, count);
      const auto factor = static_cast<float>(scale);
#ifdef SPECDEC_ATTENTION_TILES
      if constexpr (std::is_same_v<T, BFloat16>)
        if (in_tiles) attend_tiles(own, count, keys, of_keys, values, of_values, slots, attended, factor, mixed);
#endif
      if (!in_tiles) attend(own, count, keys, of_keys, values, of_values, attended, factor, mixed);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t head = kv_head * group + (unit + i) % group, column = (unit + i) / group;
        T* at = out + ((row * width + column) * heads + head) * value_dim;
        in_vectors(value_dim,
            [&](int64_t d, auto read, auto write) { write(at + d, read(mixed + i * value_dim + d)); });
      }
    }
  });
}

template <typename T>
void attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first,
    const Tensor& last, double scale, Tensor& y) {
  const Queries<T> queries{data<T>(query), query.stride(0), query.stride(1), query.stride(2), query.size(1),
      query.size(2)};
  attention_into<T>(queries, key, value, data<int32_t>(first), data<int32_t>(last),
      query.size(2), scale, mutable_data<T>(y));
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first, const Tensor& last,
    double scale) {
  const auto dtype = query.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    return attention(query.to(at::kFloat), key.to(at::kFloat), value.to(at::kFloat), first, last, scale).to(dtype);
  Tensor y = empty({query.size(0), query.size(2), query.size(1), value.size(3)}, dtype);
  Tensor from = first.contiguous(), to = last.contiguous();
  dtype == at::kFloat ? attention_of<float>(query, key, value, from, to, scale, y)
                      : attention_of<BFloat16>(query, key, value, from, to, scale, y);
  return y;
}

// On one thread: PyTorch uses OpenMP from 2,048 numbers on, and MKL, where PyTorch has its cosines from it, from a
// hundred on. OpenMP's threads then spin on the cores that the next operators need.
std::tuple<Tensor, Tensor> cos_sin(const Tensor& x) {
#if defined(__linux__)
  struct OneThread {
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    ~OneThread() {
      if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
    }
  } const one_thread;
#endif
  constexpr int64_t PART = 1024;
  const Tensor angles = x.contiguous();
  const std::tuple<Tensor, Tensor> results{at::empty_like(angles), at::empty_like(angles)};
  const Tensor from = angles.view(-1), cosines = std::get<0>(results).view(-1), sines = std::get<1>(results).view(-1);
  for (int64_t first = 0; first < from.numel(); first += PART) {
    auto part = [&](const Tensor& of) { return of.narrow(0, first, std::min(PART, from.numel() - first)); };
    Tensor cosine = part(cosines), sine = part(sines);
    at::cos_out(cosine, part(from));
    at::sin_out(sine, part(from));
  }
  return results;
}

// x [D] rotated: x * cos + rotate_half(x) * sin, each operation rounded to T.
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, int64_t dim, T* y) {
  const int64_t half = dim / 2;
  in_vectors(half, [&](int64_t d, auto read, auto write) {
    const Vec low = read(x + d), high = read(x + half + d);
    write(y + d, rounded_to<T>(low * read(cos + d)) - rounded_to<T>(high * read(sin + d)));
    write(y + half + d, rounded_to<T>(high * read(cos + half + d)) + rounded_to<T>(low * read(sin + half + d)));
  });
}

// What rotary attention takes with the states: cos and sin [B, W, D], positions [B, W], intervals [B, 2, W, 1], and the
// buffers keys [B, H', S, D], values [B, H', S, DV].
struct Rotary {
  const Tensor &cos, &sin, &positions, &intervals;
  Tensor &keys, &values;
  double scale;

  int64_t rows() const { return positions.size(0); }
  int64_t width() const { return positions.size(1); }
  int64_t dim() const { return keys.size(3); }
  int64_t value_dim() const { return values.size(3); }
  int64_t kv_heads() const { return keys.size(1); }

  void check(at::ScalarType dtype, int64_t query_size) const {  // query_size: H * D
    for (const Tensor* x : {&cos, &sin, static_cast<const Tensor*>(&keys), static_cast<const Tensor*>(&values)})
      TORCH_CHECK(x->scalar_type() == dtype && (dtype == at::kFloat || dtype == at::kBFloat16),
          "rotary_attention: all in one dtype, float32 or bfloat16");
    TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1 && keys.size(0) == rows() && values.size(0) == rows() &&
                    values.size(1) == kv_heads() && values.size(2) == keys.size(2) && dim() % 2 == 0 &&
                    query_size % (kv_heads() * dim()) == 0 && cos.numel() == rows() * width() * dim() &&
                    sin.numel() == cos.numel() && intervals.numel() == rows() * 2 * width() && cos.is_contiguous() &&
                    sin.is_contiguous() && positions.is_contiguous() && intervals.is_contiguous(),
        "rotary_attention: shapes do not match");
    const int64_t* slot_of = data<int64_t>(positions);
    for (int64_t at = 0; at < rows() * width(); ++at)
      TORCH_CHECK(slot_of[at] >= 0 && slot_of[at] < keys.size(2), "position ", slot_of[at], " of a cache of ",
          keys.size(2), " slots");
  }
};

// q [B, W, H, D], k [B, W, H', D], v [B, W, H', DV] -> y [B, W, H, DV]
template <typename T>
void rotary_attention_of(const T* q, const T* k, const T* v, int64_t heads, const Rotary& rotary, T* y) {
  const int64_t rows = rotary.rows(), width = rotary.width(), dim = rotary.dim(), value_dim = rotary.value_dim(),
      kv_heads = rotary.kv_heads();
  const Tensor &keys = rotary.keys, &values = rotary.values;
  const int64_t key_strides[] = {keys.stride(0), keys.stride(1), keys.stride(2)};
  const int64_t value_strides[] = {values.stride(0), values.stride(1), values.stride(2)};
  const T *c = data<T>(rotary.cos), *s = data<T>(rotary.sin);
  const int64_t* slot_of = data<int64_t>(rotary.positions);
  T *rotated = scratch<T, 2>(rows * width * heads * dim), *to_keys = mutable_data<T>(rotary.keys),
    *to_values = mutable_data<T>(rotary.values);
  const int64_t grain = std::max<int64_t>(1, WORK / (16 * (heads + 2 * kv_heads) * dim));
  parallel_for(0, rows * width, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const T *cos_at = c + at * dim, *sin_at = s + at * dim;
      const int64_t row = at / width, slot = slot_of[at];
      for (int64_t head = 0; head < heads; ++head)
        rotate(q + (at * heads + head) * dim, cos_at, sin_at, dim, rotated + (at * heads + head) * dim);
      for (int64_t head = 0; head < kv_heads; ++head) {
        rotate(k + (at * kv_heads + head) * dim, cos_at, sin_at, dim,
            to_keys + row * key_strides[0] + head * key_strides[1] + slot * key_strides[2]);
        std::memcpy(to_values + row * value_strides[0] + head * value_strides[1] + slot * value_strides[2],
            v + (at * kv_heads + head) * value_dim, value_dim * sizeof(T));
      }
    }
  });
  const Queries<T> queries{rotated, width * heads * dim, dim, heads * dim, heads, width};
  const int32_t* first = data<int32_t>(rotary.intervals);
  attention_into<T>(queries, keys, values, first, first + width, 2 * width, rotary.scale, y);
}

Tensor rotary_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
    const Tensor& sin, const Tensor& positions, const Tensor& intervals, Tensor keys, Tensor values, double scale) {
  for (const Tensor* x : {&query, &key, &value, &cos, &sin, &positions, &intervals})
    if (!x->is_contiguous())
      return rotary_attention(query.contiguous(), key.contiguous(), value.contiguous(), cos.contiguous(),
          sin.contiguous(), positions.contiguous(), intervals.contiguous(), keys, values, scale);
  const auto dtype = query.scalar_type();
  const Rotary rotary{cos, sin, positions, intervals, keys, values, scale};
  rotary.check(dtype, query.size(2));
  const int64_t rows = positions.size(0), width = positions.size(1), dim = keys.size(3),
      per_position = rows * width * keys.size(1), heads = query.size(2) / dim;
  TORCH_CHECK(query.numel() == rows * width * query.size(2) && key.numel() == per_position * dim &&
                  value.numel() == per_position * values.size(3) && key.scalar_type() == dtype &&
                  value.scalar_type() == dtype,
      "rotary_attention: shapes do not match");
  Tensor y = empty({rows, width, heads * values.size(3)}, dtype);
  auto run = [&](auto of) {
    using T = decltype(of);
    rotary_attention_of<T>(data<T>(query), data<T>(key), data<T>(value), heads, rotary,
        mutable_data<T>(y));
  };
  dtype == at::kFloat ? run(float{}) : run(BFloat16{});
  return y;
}

}  // namespace
