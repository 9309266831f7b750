// What a decoding step does around the models' forwards, an operator each instead of a dozen small ones.
//
// specdec/core and specdec/drafters define what they compute; the functions are named there. Shapes: B rows of ids [B,
// L], of which lengths [B] are committed; K draft ids, W = K + 1 window columns, V vocabulary size. Ids, lengths and
// counts are int64, flags bool.
#pragma once

#include "memory.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 1024;  // values whose largest one is found before its index, so they stay in the L1 cache
constexpr int64_t SUMMARY_COUNTS = 6;  // columns of a host summary before the overlap

// Sequences.limit: the most ids to draft for each row, [B].
Tensor draft_limits(const Tensor& lengths, const Tensor& end, const Tensor& finished, std::optional<int64_t> context,
    int64_t num_ids) {
  const int64_t batch = lengths.size(0);
  const auto length = lengths.accessor<int64_t, 1>(), ends = end.accessor<int64_t, 1>();
  const auto is_finished = finished.accessor<bool, 1>();
  Tensor limits = empty({batch}, at::kLong);
  int64_t* limit = limits.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    int64_t remaining = ends[b] - length[b] - 1;
    if (context) remaining = std::min(remaining, *context - length[b]);
    limit[b] = is_finished[b] ? 0 : std::min(std::max<int64_t>(remaining, 0), num_ids);
  }
  return limits;
}

// PromptLookup.propose: the ids that followed the last earlier occurrence of the longest n-gram of at most max_ngram
// ids that ends a row: [B, K], 0 beyond a row's draft, and how many [B]. A search reads 8 bytes a position, attention
// a hundred and more in each layer, so an index would save nothing.
std::tuple<Tensor, Tensor> prompt_lookup(const Tensor& ids, const Tensor& lengths, const Tensor& limit,
    int64_t max_ngram, int64_t num_ids) {
  const int64_t batch = ids.size(0);
  const auto text = ids.accessor<int64_t, 2>();
  const auto length = lengths.accessor<int64_t, 1>(), limits = limit.accessor<int64_t, 1>();
  Tensor draft_ids = empty({batch, num_ids}, at::kLong), draft_lengths = empty({batch}, at::kLong);
  int64_t* drafted = draft_ids.mutable_data_ptr<int64_t>();
  std::fill(drafted, drafted + batch * num_ids, 0);
  int64_t* counts = draft_lengths.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = length[b];
    TORCH_CHECK(0 < n && n <= ids.size(1), "row ", b, " has ", n, " of ", ids.size(1), " ids");
    const auto row = text[b];
    int64_t longest = 0, following = n;
    for (int64_t i = n - 2; i >= 0 && longest < max_ngram; --i) {
      int64_t matched = 0;
      while (matched < max_ngram && matched <= i && row[i - matched] == row[n - 1 - matched]) ++matched;
      if (matched > longest) longest = matched, following = i + 1;
    }
    counts[b] = std::min(limits[b], n - following);
    for (int64_t i = 0; i < std::min(num_ids, counts[b]); ++i) drafted[b * num_ids + i] = row[following + i];
  }
  return {draft_ids, draft_lengths};
}

// Sequences.stage_window: the draft within limit [B] and the vocabulary, where that changed it [B], and the window's
// ids and positions [B, W]. Writes the draft behind the committed ids.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> stage_window(const Tensor& ids, const Tensor& lengths,
    const Tensor& draft_ids, const Tensor& draft_lengths, const Tensor& limit, int64_t vocab_size) {
  const int64_t batch = ids.size(0), num_ids = draft_ids.size(1), width = num_ids + 1;
  auto text = ids.accessor<int64_t, 2>();
  const auto draft = draft_ids.accessor<int64_t, 2>();
  const auto length = lengths.accessor<int64_t, 1>(), drafted = draft_lengths.accessor<int64_t, 1>(),
             limits = limit.accessor<int64_t, 1>();
  Tensor allowed_ids = empty({batch, num_ids}, at::kLong), allowed_lengths = empty({batch}, at::kLong),
         broken = empty({batch}, at::kBool), window_ids = empty({batch, width}, at::kLong),
         positions = empty({batch, width}, at::kLong);
  int64_t* allowed = allowed_ids.mutable_data_ptr<int64_t>();
  int64_t* window = window_ids.mutable_data_ptr<int64_t>();
  int64_t* position = positions.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = length[b];
    TORCH_CHECK(0 < n && n + num_ids <= ids.size(1), "row ", b, " has ", n, " of ", ids.size(1), " ids");
    const int64_t count = std::min(std::min(std::max<int64_t>(drafted[b], 0), num_ids), limits[b]);
    bool is_broken = count != drafted[b];
    for (int64_t i = 0; i < num_ids; ++i) {
      const int64_t id = std::min(std::max<int64_t>(draft[b][i], 0), vocab_size - 1);
      is_broken |= id != draft[b][i];
      text[b][n + i] = allowed[b * num_ids + i] = id;
    }
    allowed_lengths.mutable_data_ptr<int64_t>()[b] = count;
    broken.mutable_data_ptr<bool>()[b] = is_broken;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t at = position[b * width + c] = n - 1 + (c <= count ? c : 0);
      window[b * width + c] = text[b][at];
    }
  }
  return {allowed_ids, allowed_lengths, broken, window_ids, positions};
}

// The index of the first of the largest of `count` values; of the first NaN where there is one.
inline int64_t argmax(const float* x, int64_t count) {
  int64_t best = 0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, count);
    Vec top = splat(x[best]);
    IntVec is_nan = {};
    int64_t i = start;
    for (; i + LANES <= stop; i += LANES) {
      const Vec some = load(x + i);
      top = some > top ? some : top;
      is_nan |= some != some;
    }
    float largest = top[0];
    bool has_nan = false;
    for (int64_t lane = 0; lane < LANES; ++lane) {
      largest = top[lane] > largest ? top[lane] : largest;
      has_nan |= is_nan[lane] != 0;
    }
    for (; i < stop; ++i) {
      largest = x[i] > largest ? x[i] : largest;
      has_nan |= x[i] != x[i];
    }
    if (has_nan)
      for (int64_t j = start;; ++j)
        if (x[j] != x[j]) return j;
    if (largest > x[best]) best = std::find(x + start, x + stop, largest) - x;
  }
  return best;
}

// scores.argmax(-1) of float32 [B, W, V]: [B, W]
Tensor greedy_ids(const Tensor& scores) {
  TORCH_CHECK(scores.dim() == 3 && scores.size(2) > 0, "scores have shape ", scores.sizes());
  const Tensor rows = scores.contiguous();
  const int64_t vocab_size = scores.size(2);
  const float* from = rows.const_data_ptr<float>();
  Tensor ids = empty({scores.size(0), scores.size(1)}, at::kLong);
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, ids.numel(), std::max<int64_t>(1, WORK / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) id[i] = argmax(from + i * vocab_size, vocab_size);
  });
  return ids;
}

// The first of `count` indices at which the sum of the weights up to it exceeds uniform * the sum of all.
template <typename Weight>
int64_t invert(Weight weight, int64_t count, double uniform) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += weight(i);
  const double below_total = std::nextafter(total, 0.0), product = uniform * total;
  const double target = product < below_total ? product : below_total;  // NaN where the total is
  double sum = 0;
  int64_t i = 0;
  while (i < count - 1 && !((sum += weight(i)) > target)) ++i;
  return i;
}

// sampling.draw from weights float32 [..., V] by uniforms float64 [...]: [...]
Tensor draw(const Tensor& weights, const Tensor& uniforms) {
  const Tensor rows = weights.contiguous(), at = uniforms.contiguous();
  const int64_t vocab_size = weights.size(-1), count = at.numel();
  TORCH_CHECK(vocab_size > 0 && rows.numel() == count * vocab_size, "weights of shape ", weights.sizes(), " for ",
      count, " uniforms");
  const float* from = rows.const_data_ptr<float>();
  const double* uniform = at.const_data_ptr<double>();
  Tensor ids = empty(uniforms.sizes(), at::kLong);
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, count, std::max<int64_t>(1, WORK / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* weight = from + i * vocab_size;
      id[i] = invert([=](int64_t j) { return weight[j]; }, vocab_size, uniform[i]);
    }
  });
  return ids;
}

// verification.verify: how many draft ids are accepted [B], and the id after them [B]. target_probs: float32 [B, W, V].
// draft_probs: float32 [B, K, V], or none where each is one-hot. uniforms: float64 [B, W].
std::tuple<Tensor, Tensor> verify(const Tensor& target_probs, const Tensor& draft_ids,
    const std::optional<Tensor>& draft_probs, const Tensor& draft_lengths, const Tensor& uniforms) {
  const int64_t batch = draft_ids.size(0), num_ids = draft_ids.size(1), vocab_size = target_probs.size(-1);
  TORCH_CHECK(target_probs.numel() == batch * (num_ids + 1) * vocab_size &&
          (!draft_probs || draft_probs->numel() == batch * num_ids * vocab_size),
      "target_probs of shape ", target_probs.sizes(), " for ", batch, " drafts of ", num_ids, " ids");
  const Tensor targets = target_probs.contiguous(), drafts = draft_probs ? draft_probs->contiguous() : Tensor();
  const float* first_p = targets.const_data_ptr<float>();
  const float* first_q = draft_probs ? drafts.const_data_ptr<float>() : nullptr;
  const auto draft = draft_ids.accessor<int64_t, 2>();
  const auto length = draft_lengths.accessor<int64_t, 1>();
  const auto uniform = uniforms.accessor<double, 2>();
  Tensor accepted = empty({batch}, at::kLong), next_ids = empty({batch}, at::kLong);
  int64_t* counts = accepted.mutable_data_ptr<int64_t>();
  int64_t* next = next_ids.mutable_data_ptr<int64_t>();
  parallel_for(0, batch, std::max<int64_t>(1, WORK / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t num_drafted = std::min(length[b], num_ids);
      int64_t count = 0;
      const float* p = first_p + b * (num_ids + 1) * vocab_size;
      const float* q = first_q ? first_q + b * num_ids * vocab_size : nullptr;
      for (; count < num_drafted; ++count, p += vocab_size, q += q ? vocab_size : 0) {
        const int64_t id = draft[b][count];
        TORCH_CHECK(0 <= id && id < vocab_size, "draft id ", id, " of a vocabulary of ", vocab_size);
        if (!(uniform[b][count] * (q ? q[id] : 1.0f) < p[id])) break;
      }
      const int64_t rejected = count < num_drafted ? draft[b][count] : -1;
      auto excess = [=](int64_t i) {  // max(p - q, 0)
        const float difference = p[i] - (q ? q[i] : i == rejected);
        return difference < 0 ? 0.0f : difference;
      };
      bool has_residual = false;
      for (int64_t i = 0; rejected >= 0 && i < vocab_size && !has_residual; ++i) has_residual = excess(i) > 0;
      const double at = uniform[b][num_ids];
      counts[b] = count;
      next[b] = has_residual ? invert(excess, vocab_size, at) : invert([=](int64_t i) { return p[i]; }, vocab_size, at);
    }
  });
  return {accepted, next_ids};
}

// The chances of verification.verify_block, by row.
struct BlockChances {
  const float *p, *q;  // [K + 1, V], [K, V]
  int64_t vocab_size;

  // sum(max(w * p - q, 0)) and sum(min(w * p, q)) after i draft ids.
  std::pair<double, double> sums(int64_t i, double w) const {
    const float *target = p + i * vocab_size, *draft = q + i * vocab_size, weight = static_cast<float>(w);
    double excess = 0, shared = 0;
    for (int64_t start = 0; start < vocab_size; start += BLOCK) {
      const int64_t stop = std::min(start + BLOCK, vocab_size);
      Vec more = {}, both = {};
      int64_t j = start;
      for (; j + LANES <= stop; j += LANES) {
        const Vec some = load(target + j) * weight, other = load(draft + j);
        const Vec difference = some - other;  // NaN passes on
        more += difference <= 0 ? Vec{} : difference;
        both += difference <= 0 ? some : difference > 0 ? other : difference;
      }
      for (int64_t lane = 0; lane < LANES; ++lane) excess += more[lane], shared += both[lane];
      for (; j < stop; ++j) {
        const float some = target[j] * weight, difference = some - draft[j];
        excess += difference <= 0 ? 0 : difference;
        shared += difference <= 0 ? some : difference > 0 ? draft[j] : difference;
      }
    }
    return {excess, shared};
  }
};

// verification.verify_block: how many draft ids are accepted [B], the id after them [B], and the chance of each draft
// id to be accepted after those before it, float32 [B, K], 0 beyond a row's draft. Arguments as in verify.
std::tuple<Tensor, Tensor, Tensor> verify_block(const Tensor& target_probs, const Tensor& draft_ids,
    const Tensor& draft_probs, const Tensor& draft_lengths, const Tensor& uniforms) {
  const int64_t batch = draft_ids.size(0), num_ids = draft_ids.size(1), vocab_size = target_probs.size(-1);
  TORCH_CHECK(target_probs.numel() == batch * (num_ids + 1) * vocab_size &&
          draft_probs.numel() == batch * num_ids * vocab_size,
      "target_probs of shape ", target_probs.sizes(), " for ", batch, " drafts of ", num_ids, " ids");
  const Tensor targets = target_probs.contiguous(), drafts = draft_probs.contiguous();
  const float *first_p = targets.const_data_ptr<float>(), *first_q = drafts.const_data_ptr<float>();
  const auto draft = draft_ids.accessor<int64_t, 2>();
  const auto length = draft_lengths.accessor<int64_t, 1>();
  const auto uniform = uniforms.accessor<double, 2>();
  Tensor accepted = empty({batch}, at::kLong), next_ids = empty({batch}, at::kLong),
         overlap = empty({batch, num_ids}, at::kFloat);
  int64_t* counts = accepted.mutable_data_ptr<int64_t>();
  int64_t* next = next_ids.mutable_data_ptr<int64_t>();
  float* shares = overlap.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, WORK / (vocab_size * std::max<int64_t>(1, num_ids)));
  parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t num_drafted = std::min(length[b], num_ids);
      const BlockChances row{first_p + b * (num_ids + 1) * vocab_size, first_q + b * num_ids * vocab_size, vocab_size};
      int64_t count = 0;
      double w = 1, kept_w = 1;
      std::fill(shares + b * num_ids, shares + (b + 1) * num_ids, 0.0f);
      for (int64_t i = 0; i <= num_drafted; ++i) {  // w is of i draft ids
        double chance = w;
        if (i < num_drafted) {
          const auto [excess, shared] = row.sums(i, w);
          shares[b * num_ids + i] = shared / std::max<double>(w, std::numeric_limits<float>::min());
          chance = excess == 0 && w == 1 ? 1 : excess / (excess + 1 - w);  // 1: p == q, so w stays 1
        }
        if (i && uniform[b][i - 1] < chance) count = i, kept_w = w;
        if (i == num_drafted) break;
        const int64_t id = draft[b][i];
        TORCH_CHECK(0 <= id && id < vocab_size, "draft id ", id, " of a vocabulary of ", vocab_size);
        const double p = row.p[i * vocab_size + id], q = row.q[i * vocab_size + id];
        w = q > 0 ? std::min(w * (p / q), 1.0) : 0;
      }
      const float *p = row.p + count * vocab_size, *q = row.q + count * vocab_size;
      const float weight = static_cast<float>(kept_w);
      auto excess = [=](int64_t i) {  // max(w * p - q, 0)
        const float difference = weight * p[i] - q[i];
        return difference < 0 ? 0.0f : difference;
      };
      bool has_residual = false;
      for (int64_t i = 0; count < num_drafted && i < vocab_size && !has_residual; ++i) has_residual = excess(i) > 0;
      const double at = uniform[b][num_ids];
      counts[b] = count;
      next[b] = has_residual ? invert(excess, vocab_size, at) : invert([=](int64_t i) { return p[i]; }, vocab_size, at);
    }
  });
  return {accepted, next_ids, overlap};
}

// verification.verify_draft of a greedy call, against scores float32 [B, W, V]: how many draft ids are accepted [B],
// the target's next id [B], overlap float32 [B, K], whether a row's scores contain NaN [B].
std::tuple<Tensor, Tensor, Tensor, Tensor> verify_greedy(const Tensor& scores, const Tensor& draft_ids,
    const Tensor& draft_lengths) {
  const int64_t batch = draft_ids.size(0), num_ids = draft_ids.size(1), width = num_ids + 1;
  TORCH_CHECK(scores.size(0) == batch && scores.size(1) == width, "scores of shape ", scores.sizes(), " for ", batch,
      " drafts of ", num_ids, " ids");
  const Tensor rows = scores.contiguous(), target_ids = greedy_ids(rows);
  const int64_t* target = target_ids.const_data_ptr<int64_t>();
  const float* score = rows.const_data_ptr<float>();
  const auto draft = draft_ids.accessor<int64_t, 2>();
  const auto length = draft_lengths.accessor<int64_t, 1>();
  Tensor accepted = empty({batch}, at::kLong), next_ids = empty({batch}, at::kLong),
         overlap = empty({batch, num_ids}, at::kFloat), is_nan = empty({batch}, at::kBool);
  float* shared = overlap.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b, target += width, score += width * rows.size(2), shared += num_ids) {
    int64_t count = 0;
    bool has_nan = false;
    for (int64_t i = 0; i < num_ids; ++i) {
      shared[i] = draft[b][i] == target[i];
      if (count == i && i < length[b] && draft[b][i] == target[i]) ++count;
    }
    for (int64_t c = 0; c < width; ++c) has_nan |= std::isnan(score[c * rows.size(2) + target[c]]);
    accepted.mutable_data_ptr<int64_t>()[b] = count;
    next_ids.mutable_data_ptr<int64_t>()[b] = target[count];
    is_nan.mutable_data_ptr<bool>()[b] = has_nan;
  }
  return {accepted, next_ids, overlap, is_nan};
}

// commit.commit_verdict without a stop function: appends the accepted ids and the next id of each row, up to its first
// stop id, and counts them: host_summary float32 [B, 6 + K].
Tensor commit(const Tensor& ids, const Tensor& lengths, const Tensor& end,
    const Tensor& finished, const std::optional<Tensor>& stop_ids, const Tensor& limit, const Tensor& draft_ids,
    const std::optional<Tensor>& draft_probs, const Tensor& draft_lengths, const Tensor& accepted,
    const Tensor& next_ids, const Tensor& overlap, const Tensor& is_broken, const Tensor& is_nan) {
  const int64_t batch = ids.size(0), num_ids = draft_ids.size(1);
  auto text = ids.accessor<int64_t, 2>();
  auto length = lengths.accessor<int64_t, 1>();
  auto is_finished = finished.accessor<bool, 1>();
  const auto ends = end.accessor<int64_t, 1>(), limits = limit.accessor<int64_t, 1>(),
             drafted = draft_lengths.accessor<int64_t, 1>(), verified = accepted.accessor<int64_t, 1>(),
             next = next_ids.accessor<int64_t, 1>();
  const auto draft = draft_ids.accessor<int64_t, 2>();
  const auto shared = overlap.accessor<float, 2>();
  const auto broken = is_broken.accessor<bool, 1>(), nan = is_nan.accessor<bool, 1>();
  const Tensor stops = stop_ids ? stop_ids->to(at::kLong).contiguous() : Tensor();
  const int64_t *stop = stop_ids ? stops.const_data_ptr<int64_t>() : nullptr, num_stops = stop_ids ? stops.numel() : 0;
  Tensor host_summary = empty({batch, SUMMARY_COUNTS + num_ids}, at::kFloat);
  float* summary = host_summary.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b, summary += SUMMARY_COUNTS + num_ids) {
    const int64_t n = length[b];
    TORCH_CHECK(0 <= verified[b] && verified[b] <= num_ids && n + num_ids < ids.size(1), "row ", b, " has ", n, " of ",
        ids.size(1), " ids, and ", verified[b], " of ", num_ids, " draft ids are accepted");
    const bool is_live = !is_finished[b];
    for (int64_t i = 0; i < num_ids; ++i) text[b][n + i] = draft[b][i];
    text[b][n + verified[b]] = text[b][n + num_ids] = next[b];
    int64_t count = is_live ? verified[b] + 1 : 0;
    bool is_last = is_live && n + count >= ends[b];
    for (int64_t i = 0; i < count; ++i)
      if (std::find(stop, stop + num_stops, text[b][n + i]) != stop + num_stops) count = i + 1, is_last = true;
    length[b] += count;
    is_finished[b] |= is_last;

    const int64_t num_drafted = is_last ? std::min<int64_t>(drafted[b], count) : drafted[b];
    const int64_t num_accepted = std::min<int64_t>(verified[b], count);
    bool draft_is_nan = false;
    if (draft_probs)
      for (int64_t i = 0; i < num_ids; ++i) draft_is_nan |= std::isnan(draft_probs->accessor<float, 3>()[b][i][0]);
    const int64_t faults = broken[b] + 2 * draft_is_nan + 4 * nan[b];  // BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET
    const int64_t counts[] = {limits[b], num_drafted, num_accepted, count, is_last, faults};
    std::copy(std::begin(counts), std::end(counts), summary);
    for (int64_t i = 0; i < num_ids; ++i) summary[SUMMARY_COUNTS + i] = shared[b][i];
  }
  return host_summary;
}

// verify_greedy, then commit: how many draft ids are accepted [B], the target's next id [B], and host_summary.
std::tuple<Tensor, Tensor, Tensor> commit_greedy(const Tensor& scores, const Tensor& ids, const Tensor& lengths,
    const Tensor& end, const Tensor& finished, const std::optional<Tensor>& stop_ids, const Tensor& limit,
    const Tensor& draft_ids, const Tensor& draft_lengths, const Tensor& is_broken) {
  const auto [accepted, next_ids, overlap, is_nan] = verify_greedy(scores, draft_ids, draft_lengths);
  return {accepted, next_ids,
      commit(ids, lengths, end, finished, stop_ids, limit, draft_ids, std::nullopt, draft_lengths, accepted, next_ids,
          overlap, is_broken, is_nan)};
}

}  // namespace
