// The tree of suffixes of specdec/drafters/suffix_tree.py, which documents it, in arrays: the same proposals.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <mutex>
#include <tuple>
#include <vector>

#include "memory.h"

namespace {

// Values by keys of two numbers: open addressing, and no marks of what was erased.
template <typename Value>
class PairMap {
 public:
  Value* find(int32_t a, int32_t b) {
    for (size_t at = home(key(a, b));; at = next(at)) {
      if (slots_[at].key == key(a, b)) return &slots_[at].value;
      if (slots_[at].key == FREE) return nullptr;
    }
  }

  void set(int32_t a, int32_t b, Value value) {
    if (Value* found = find(a, b)) {
      *found = value;
      return;
    }
    if (3 * ++size_ > 2 * slots_.size()) grow();
    place({key(a, b), value});
  }

  void erase(int32_t a, int32_t b) {
    size_t hole = home(key(a, b));
    while (slots_[hole].key != key(a, b)) hole = next(hole);
    --size_;
    // what stands behind the hole moves into it, unless its search begins behind the hole
    for (size_t at = next(hole); slots_[at].key != FREE; at = next(at)) {
      const size_t from = home(slots_[at].key);
      if (hole <= at ? (from <= hole || from > at) : (from <= hole && from > at)) {
        slots_[hole] = slots_[at];
        hole = at;
      }
    }
    slots_[hole].key = FREE;
  }

 private:
  static constexpr uint64_t FREE = ~uint64_t{0};
  struct Slot {
    uint64_t key = FREE;
    Value value{};
  };

  static uint64_t key(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }
  size_t home(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u >> 20) & (slots_.size() - 1); }
  size_t next(size_t at) const { return (at + 1) & (slots_.size() - 1); }

  void place(Slot slot) {
    size_t at = home(slot.key);
    while (slots_[at].key != FREE) at = next(at);
    slots_[at] = slot;
  }

  void grow() {
    std::vector<Slot> before(2 * slots_.size());
    before.swap(slots_);
    for (const Slot& slot : before)
      if (slot.key != FREE) place(slot);
  }

  std::vector<Slot> slots_ = std::vector<Slot>(16);
  size_t size_ = 0;
};

struct Proposal {
  std::vector<int32_t> ids;
  float score = 0;
};

class SuffixTree {
 public:
  explicit SuffixTree(int64_t depth) : depth_(depth) { nodes_.push_back({}); }

  bool is_empty() const { return texts_.empty(); }
  int64_t length() const { return texts_.empty() ? 0 : texts_.back().size(); }

  void begin_text() {
    texts_.emplace_back();
    ends_of_suffixes_.clear();
  }

  // Adds an id to the last text.
  void append(int32_t token) {
    std::vector<int32_t>& ids = texts_.back();
    const int32_t text = first_text_ + texts_.size() - 1;
    nodes_[ROOT].count += 1;
    ends_of_suffixes_.push_back(ROOT);
    if (int64_t(ends_of_suffixes_.size()) > depth_) ends_of_suffixes_.erase(ends_of_suffixes_.begin());
    ids.push_back(token);
    const int32_t end = ids.size();
    for (int32_t& active : ends_of_suffixes_) {
      const int32_t node = active;
      int32_t child = child_of(node, token);
      if (child == NONE) {
        if (nodes_[node].count == 1 && node != ROOT) {
          nodes_[node].length += 1;
        } else {
          active = new_node(node, text, end - 1, 1, 1);
          add_child(active);
        }
        continue;
      }
      if (nodes_[node].count == nodes_[child].count + 1 && node != ROOT) {
        if (nodes_[child].length == 1) {
          Node& one = nodes_[child];
          one.count += 1;
          one.length = nodes_[node].length + 1;
          one.text = text, one.start = end - one.length;
          take_place(node, child);
          free_.push_back(node);
          active = child;
        } else {
          Node &one = nodes_[node], &other = nodes_[child];
          one.length += 1;
          one.text = text, one.start = end - one.length;
          other.start += 1, other.length -= 1;
        }
        continue;
      }
      if (nodes_[child].length > 1) {
        const int32_t rest = child;
        child = new_node(node, text, end - 1, 1, nodes_[rest].count);
        take_place(rest, child);
        Node& other = nodes_[rest];
        other.start += 1, other.length -= 1, other.parent = child;
        add_child(rest);
      }
      nodes_[child].text = text, nodes_[child].start = end - 1;
      count_up(child);
      active = child;
    }
  }

  // Removes the first text, which must be complete.
  void remove_first() {
    const std::vector<int32_t>& ids = texts_.front();
    const size_t length = ids.size();
    for (size_t begin = 0; begin < length; ++begin) {
      int32_t node = ROOT;
      nodes_[ROOT].count -= 1;
      for (size_t at = begin; at < length;) {
        const int32_t child = child_of(node, ids[at]);
        if (child == NONE) break;
        if (nodes_[child].count == 1) {
          remove_child(child);
          free_.push_back(child);
          break;
        }
        count_down(child);
        at += nodes_[child].length;
        node = child;
      }
      const int32_t only = nodes_[node].first;
      if (node == ROOT || !has_one_child(node) || nodes_[only].count != nodes_[node].count) continue;
      nodes_[only].start -= nodes_[node].length, nodes_[only].length += nodes_[node].length;
      take_place(node, only);
      free_.push_back(node);
    }
    texts_.pop_front();
    first_text_ += 1;
  }

  // What follows the last ids of the last text.
  Proposal propose_for_last(int64_t max_ids, double factor, float min_probability) {
    Proposal best;
    for (int64_t match = std::min<int64_t>(depth_, length()) - 1; match > 0; --match) {
      const int64_t limit = limit_of(match, max_ids, factor);
      if (best.score >= limit) break;
      const int32_t node = ends_of_suffixes_[ends_of_suffixes_.size() - match];
      if (nodes_[node].first != NONE) keep_better(best, node, nodes_[node].length, limit, min_probability);
    }
    return best;
  }

  // What follows the last ids of a context.
  Proposal propose(const int64_t* context, int64_t size, int64_t max_ids, double factor, float min_probability) {
    Proposal best;
    int64_t longest = 0, too_long = std::min(depth_, size);
    context += size;
    while (longest + 1 < too_long) {
      const int64_t middle = (longest + too_long) / 2;
      (std::get<0>(find(context, middle)) == NONE ? too_long : longest) = middle;
    }
    for (int64_t match = longest; match > 0; --match) {
      const int64_t limit = limit_of(match, max_ids, factor);
      if (best.score >= limit) break;
      const auto [node, at] = find(context, match);
      keep_better(best, node, at, limit, min_probability);
    }
    return best;
  }

 private:
  static constexpr int32_t ROOT = 0, NONE = -1;

  struct Node {
    int32_t parent = NONE, text = 0, start = 0, length = 0, count = 0;
    int32_t first = NONE, last = NONE, next = NONE, previous = NONE;
  };
  struct Ends {
    int32_t first = NONE, last = NONE;
  };

  int32_t new_node(int32_t parent, int32_t text, int32_t start, int32_t length, int32_t count) {
    int32_t node = nodes_.size();
    if (free_.empty()) {
      nodes_.emplace_back();
    } else {
      node = free_.back();
      free_.pop_back();
    }
    nodes_[node] = {parent, text, start, length, count};
    return node;
  }

  int32_t id(int32_t node, int32_t at) const {
    return texts_[nodes_[node].text - first_text_][nodes_[node].start + at];
  }
  int32_t first_id(int32_t node) const { return id(node, 0); }

  static int64_t limit_of(int64_t match, int64_t max_ids, double factor) {
    return std::min(max_ids, int64_t(match * factor + 1e-6));
  }

  // The node in which the last `match` ids before `end` end, and after how many of its ids; NONE: nowhere.
  std::tuple<int32_t, int32_t> find(const int64_t* end, int64_t match) {
    int32_t node = ROOT, at = 0;
    for (const int64_t* token = end - match; token < end; ++token) {
      if (at == nodes_[node].length) {
        node = child_of(node, *token), at = 1;
        if (node == NONE) return {NONE, 0};
      } else if (id(node, at) == *token) {
        ++at;
      } else {
        return {NONE, 0};
      }
    }
    return {node, at};
  }

  void keep_better(Proposal& best, int32_t node, int32_t at, int64_t max_ids, float min_probability) {
    Proposal found;
    float probability = 1;
    while (int64_t(found.ids.size()) < max_ids && probability >= min_probability) {
      if (at == nodes_[node].length) {
        const int32_t child = nodes_[node].first;
        if (child == NONE) break;
        probability *= float(nodes_[child].count) / float(nodes_[node].count);
        node = child, at = 0;
      } else {
        found.ids.push_back(id(node, at++));
        found.score += probability;
      }
    }
    if (found.score > best.score) best = std::move(found);
  }

  bool has_one_child(int32_t node) const {
    return nodes_[node].first != NONE && nodes_[node].first == nodes_[node].last;
  }

  // Children of a node that has two or more are found by children_, and the ends of each count by ends_.
  int32_t child_of(int32_t node, int32_t token) {
    const int32_t first = nodes_[node].first;
    if (first == NONE) return NONE;
    if (first == nodes_[node].last) return first_id(first) == token ? first : NONE;
    const int32_t* found = children_.find(node, token);
    return found ? *found : NONE;
  }

  // Makes a node the last child of its parent.
  void add_child(int32_t node) {
    const int32_t parent = nodes_[node].parent, last = nodes_[parent].last;
    if (last == NONE) {
      nodes_[parent].first = nodes_[parent].last = node;
      nodes_[node].next = nodes_[node].previous = NONE;
      return;
    }
    if (has_one_child(parent)) {
      children_.set(parent, first_id(last), last);
      ends_.set(parent, nodes_[last].count, {last, last});
    }
    children_.set(parent, first_id(node), node);
    insert(node, NONE);
  }

  void remove_child(int32_t node) {
    const int32_t parent = nodes_[node].parent;
    if (has_one_child(parent)) {
      nodes_[parent].first = nodes_[parent].last = NONE;
      return;
    }
    detach(node);
    children_.erase(parent, first_id(node));
    if (has_one_child(parent)) {
      const int32_t only = nodes_[parent].first;
      children_.erase(parent, first_id(only));
      ends_.erase(parent, nodes_[only].count);
    }
  }

  void link(int32_t node) {
    Node &one = nodes_[node], &parent = nodes_[one.parent];
    (one.previous == NONE ? parent.first : nodes_[one.previous].next) = node;
    (one.next == NONE ? parent.last : nodes_[one.next].previous) = node;
  }

  void insert(int32_t node, int32_t before) {
    Node& one = nodes_[node];
    one.next = before;
    one.previous = before == NONE ? nodes_[one.parent].last : nodes_[before].previous;
    link(node);
    Ends* ends = ends_.find(one.parent, one.count);
    if (!ends) {
      ends_.set(one.parent, one.count, {node, node});
    } else if (ends->first == one.next) {
      ends->first = node;
    } else {
      ends->last = node;
    }
  }

  void leave_ends(int32_t node) {
    const Node& one = nodes_[node];
    Ends* ends = ends_.find(one.parent, one.count);
    if (ends->first == ends->last) {
      ends_.erase(one.parent, one.count);
    } else if (ends->first == node) {
      ends->first = one.next;
    } else if (ends->last == node) {
      ends->last = one.previous;
    }
  }

  void detach(int32_t node) {
    leave_ends(node);
    const Node& one = nodes_[node];
    (one.previous == NONE ? nodes_[one.parent].first : nodes_[one.previous].next) = one.next;
    (one.next == NONE ? nodes_[one.parent].last : nodes_[one.next].previous) = one.previous;
  }

  void take_place(int32_t node, int32_t other) {
    const Node& one = nodes_[node];
    nodes_[other].parent = one.parent, nodes_[other].next = one.next, nodes_[other].previous = one.previous;
    const bool is_only_child = has_one_child(one.parent);
    link(other);
    if (is_only_child) return;
    children_.set(one.parent, first_id(other), other);
    Ends* ends = ends_.find(one.parent, one.count);
    if (ends->first == node) ends->first = other;
    if (ends->last == node) ends->last = other;
  }

  void count_up(int32_t node) {
    Node& one = nodes_[node];
    if (has_one_child(one.parent)) {
      one.count += 1;
      return;
    }
    if (one.previous == NONE || nodes_[one.previous].count > one.count + 1) {
      leave_ends(node);
      one.count += 1;
      ends_.set(one.parent, one.count, {node, node});
    } else {
      const int32_t before = ends_.find(one.parent, nodes_[one.previous].count)->first;
      detach(node);
      one.count += 1;
      insert(node, before);
    }
  }

  void count_down(int32_t node) {
    Node& one = nodes_[node];
    if (has_one_child(one.parent)) {
      one.count -= 1;
      return;
    }
    if (one.next != NONE && nodes_[one.next].count == one.count) {
      const int32_t last = ends_.find(one.parent, one.count)->last;
      detach(node);
      one.count -= 1;
      insert(node, nodes_[last].next);
      return;
    }
    leave_ends(node);
    one.count -= 1;
    if (Ends* ends = ends_.find(one.parent, one.count)) {
      ends->first = node;
    } else {
      ends_.set(one.parent, one.count, {node, node});
    }
  }

  int64_t depth_;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_;
  PairMap<int32_t> children_;  // by parent and first id
  PairMap<Ends> ends_;  // by parent and count
  std::deque<std::vector<int32_t>> texts_;
  int32_t first_text_ = 0;  // texts that were removed
  std::vector<int32_t> ends_of_suffixes_;  // of the last text, the longest suffix first
};

// An object in a tensor, which owns it: an operator is called in less time than a method of one of torch's classes.
template <typename T>
Tensor held(T* object) {
  auto** holder = new T*(object);
  return at::from_blob(
      holder, {int64_t(sizeof(*holder))}, [holder](void*) { delete *holder, delete holder; }, at::kByte);
}

template <typename T>
T& held_by(const Tensor& tensor) {
  return **static_cast<T**>(tensor.data_ptr());
}

// Finished texts, which calls at the same time share.
struct SuffixTexts {
  SuffixTree tree;
  std::mutex mutex;

  explicit SuffixTexts(int64_t depth) : tree(depth) {}
};

// Each row's text in a tree of its own.
struct SuffixRows {
  int64_t depth;
  std::vector<SuffixTree> trees;
};

// `like`: any tensor of this device.
Tensor suffix_texts(const Tensor& like, int64_t depth) { return held(new SuffixTexts(depth)); }

Tensor suffix_rows(const Tensor& like, int64_t num_rows, int64_t depth) {
  return held(new SuffixRows{depth, std::vector<SuffixTree>(num_rows, SuffixTree(depth))});
}

// Adds a text ids [N], then removes the first num_removed ones.
void suffix_add(const Tensor& texts, const Tensor& ids, int64_t num_removed) {
  auto& shared = held_by<SuffixTexts>(texts);
  const std::lock_guard<std::mutex> lock(shared.mutex);
  const auto tokens = ids.accessor<int64_t, 1>();
  shared.tree.begin_text();
  for (int64_t i = 0; i < tokens.size(0); ++i) shared.tree.append(tokens[i]);
  for (; num_removed > 0; --num_removed) shared.tree.remove_first();
}

// Frees the tree of a row that has finished.
void suffix_release(const Tensor& rows, int64_t row) {
  auto& own = held_by<SuffixRows>(rows);
  own.trees.at(row) = SuffixTree(own.depth);
}

// SuffixDecoding.propose_with_scores: draft ids [B, K], 0 beyond a row's draft, how many [B], and their scores float32
// [B]. Adds what is new in the texts of the rows to their trees first.
std::tuple<Tensor, Tensor, Tensor> suffix_propose(const Tensor& rows, const Tensor& texts, const Tensor& ids,
    const Tensor& lengths, const Tensor& limit, double factor, double min_probability) {
  auto& own = held_by<SuffixRows>(rows);
  auto& shared = held_by<SuffixTexts>(texts);
  TORCH_CHECK(ids.stride(1) == 1, "the ids of a row must be contiguous");
  const int64_t batch = ids.size(0);
  const auto text = ids.accessor<int64_t, 2>();
  const auto length = lengths.accessor<int64_t, 1>(), limits = limit.accessor<int64_t, 1>();
  std::vector<Proposal> found(batch);
  int64_t width = 0;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK(length[b] <= ids.size(1), "row ", b, " has ", length[b], " of ", ids.size(1), " ids");
    if (limits[b] == 0) continue;
    SuffixTree& tree = own.trees.at(b);
    if (tree.is_empty()) tree.begin_text();
    const auto row = text[b];
    for (int64_t i = tree.length(); i < length[b]; ++i) tree.append(row[i]);
    found[b] = tree.propose_for_last(limits[b], factor, min_probability);
    const int64_t context = std::min(own.depth, length[b]);
    const int64_t* last = row.data() + length[b] - context;
    const std::lock_guard<std::mutex> lock(shared.mutex);
    Proposal other = shared.tree.propose(last, context, limits[b], factor, min_probability);
    if (other.score > found[b].score) found[b] = std::move(other);
    width = std::max<int64_t>(width, found[b].ids.size());
  }
  Tensor draft_ids = empty({batch, width}, at::kLong), draft_lengths = empty({batch}, at::kLong),
         scores = empty({batch}, at::kFloat);
  int64_t* drafted = draft_ids.mutable_data_ptr<int64_t>();
  int64_t* counts = draft_lengths.mutable_data_ptr<int64_t>();
  std::fill(drafted, drafted + batch * width, 0);
  for (int64_t b = 0; b < batch; ++b) {
    counts[b] = found[b].ids.size();
    scores.mutable_data_ptr<float>()[b] = found[b].score;
    std::copy(found[b].ids.begin(), found[b].ids.end(), drafted + b * width);
  }
  return {draft_ids, draft_lengths, scores};
}

}  // namespace
