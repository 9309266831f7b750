// A compiled forward as an object that holds torch's loader of its package, so that a loop of forwards needs no Python.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include "step.h"

namespace {

// A package of torch's AOTInductor: ids, positions [B, W], the indices of the columns that are wanted [N], and the KV
// cache's buffers -> logits float32 [B, N, V].
struct Package : torch::CustomClassHolder {
  torch::inductor::AOTIModelPackageLoader loader;

  explicit Package(const std::string& path) : loader(path) {}

  std::vector<std::string> weight_names() { return loader.get_constant_fqns(); }

  std::string metadata(const std::string& key) {
    const auto all = loader.get_metadata();
    const auto found = all.find(key);
    TORCH_CHECK(found != all.end(), "the package has no metadata named ", key);
    return found->second;
  }

  // Use these tensors as weights, of which the caller keeps the memory alive.
  void set_weights(const std::vector<std::string>& names, const std::vector<Tensor>& weights) {
    std::unordered_map<std::string, Tensor> constants;
    for (size_t i = 0; i < names.size(); ++i) constants.emplace(names[i], weights[i]);
    loader.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  Tensor forward(const Tensor& ids, const Tensor& positions, const Tensor& columns,
      const std::vector<Tensor>& buffers) {
    std::vector<Tensor> inputs{ids.contiguous(), positions.contiguous(), columns};  // strides are not checked
    inputs.insert(inputs.end(), buffers.begin(), buffers.end());
    return loader.boxed_run(std::move(inputs))[0];
  }

  // ModelDrafter._draft without logits processors: feeds the `width` ids of text [B, L] that end at last [B], then
  // drafts num_ids: ids [B, K], and of sampled drafts their distributions float32 [B, K, V].
  //
  // num_embeddings: how many ids the model reads; larger ones are replaced by its last. uniforms: float64 [K, B, 1] of
  // sampled drafts, none of greedy ones.
  std::tuple<Tensor, std::optional<Tensor>> draft(const Tensor& text, const Tensor& last, const Tensor& limit,
      int64_t width, int64_t num_ids, int64_t num_embeddings, int64_t vocab_size,
      const std::optional<Tensor>& uniforms, const std::vector<Tensor>& buffers) {
    const int64_t batch = text.size(0);
    const auto row = text.accessor<int64_t, 2>();
    const auto at = last.accessor<int64_t, 1>(), limits = limit.accessor<int64_t, 1>();
    Tensor ids = empty({batch, width}, at::kLong), positions = empty({batch, width}, at::kLong),
           drafted = empty({batch, num_ids}, at::kLong);
    int64_t *id = ids.mutable_data_ptr<int64_t>(), *position = positions.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < batch; ++b) {
      TORCH_CHECK(0 <= at[b] && at[b] < text.size(1), "row ", b, " ends at ", at[b], " of ", text.size(1), " ids");
      for (int64_t c = 0; c < width; ++c) {
        const int64_t p = position[b * width + c] = std::max<int64_t>(at[b] - (width - 1 - c), 0);
        id[b * width + c] = std::min(row[b][p], num_embeddings - 1);
      }
    }
    std::vector<Tensor> probs;
    for (int64_t k = 0; k < num_ids; ++k) {
      Tensor logits = forward(ids, positions, k ? column(0) : column(width - 1), buffers);
      if (logits.size(2) > vocab_size) logits = logits.narrow(2, 0, vocab_size);
      if (uniforms) probs.push_back(at::softmax(logits, -1, at::kFloat));
      const Tensor next = uniforms ? draw(probs.back(), (*uniforms)[k]) : greedy_ids(logits);
      // a row that drafts fewer ids repeats its last committed id: the same entry in the same slot
      ids = empty({batch, 1}, at::kLong), positions = empty({batch, 1}, at::kLong);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t chosen = next.const_data_ptr<int64_t>()[b];
        const bool is_drafted = k + 1 < limits[b];
        drafted.mutable_data_ptr<int64_t>()[b * num_ids + k] = chosen;
        ids.mutable_data_ptr<int64_t>()[b] = std::min(is_drafted ? chosen : row[b][at[b]], num_embeddings - 1);
        positions.mutable_data_ptr<int64_t>()[b] = at[b] + (is_drafted ? k + 1 : 0);
      }
    }
    return {drafted, uniforms ? std::optional(at::cat(probs, 1)) : std::nullopt};
  }

  // plain.plain_steps: greedy steps of one id a row, num_steps or until all rows have finished. The tensors are
  // those of Sequences. Of each step the rows' next ids [B], the host summary [B, 6] and the logits [B, 1, V].
  std::vector<std::tuple<Tensor, Tensor, Tensor>> plain_steps(const Tensor& ids, const Tensor& lengths,
      const Tensor& end, const Tensor& finished, const std::optional<Tensor>& stop_ids, int64_t num_steps,
      int64_t vocab_size, const std::vector<Tensor>& buffers) {
    const int64_t batch = ids.size(0);
    const Tensor no_ids = empty({batch, 0}, at::kLong), zeros = empty({batch}, at::kLong);
    std::fill_n(zeros.mutable_data_ptr<int64_t>(), batch, 0);
    const bool* is_finished = finished.const_data_ptr<bool>();
    std::vector<std::tuple<Tensor, Tensor, Tensor>> steps;
    while (num_steps-- && !std::all_of(is_finished, is_finished + batch, [](bool row) { return row; })) {
      const auto [draft, count, is_broken, window, positions] =
          stage_window(ids, lengths, no_ids, zeros, zeros, vocab_size);
      const Tensor logits = forward(window, positions, column(0), buffers);
      const auto [accepted, next_ids, summary] =
          commit_greedy(logits, ids, lengths, end, finished, stop_ids, zeros, draft, count, is_broken);
      steps.emplace_back(next_ids, summary, logits);
    }
    return steps;
  }

 private:
  static Tensor column(int64_t index) {
    Tensor columns = empty({1}, at::kLong);
    columns.mutable_data_ptr<int64_t>()[0] = index;
    return columns;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.class_<Package>("Package")
      .def(torch::init<const std::string&>())
      .def("weight_names", &Package::weight_names)
      .def("metadata", &Package::metadata)
      .def("set_weights", &Package::set_weights)
      .def("forward", &Package::forward)
      .def("draft", &Package::draft)
      .def("plain_steps", &Package::plain_steps);
}
