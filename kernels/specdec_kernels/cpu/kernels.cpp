// The operators of a decoding forward on a CPU, linear layers, norms and attention, and those of a step around it.
//
// A row's result does not depend on the number of rows of a call, on its index, or on the number of threads: each
// output is summed in one fixed order. So verifying a draft's tokens together gives the same bits as computing them one
// by one.
//
// specdec_kernels/cpu/__init__.py declares and documents the operators and builds this file.

#include "attention.h"
#include "block.h"
#include "int4_linear.h"
#include "int8_linear.h"
#include "linear.h"
#include "memory.h"
#include "norm.h"
#include "package.h"
#include "shims.h"
#include "step.h"
#include "suffix_tree.h"

TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("in_huge_pages", in_huge_pages);
  m.impl("int4_linear", int4_linear);
  m.impl("int8_linear", int8_linear);
  m.impl("linear", linear);
  m.impl("attention", attention);
  m.impl("draft_limits", draft_limits);
  m.impl("prompt_lookup", prompt_lookup);
  m.impl("suffix_texts", suffix_texts);
  m.impl("suffix_rows", suffix_rows);
  m.impl("suffix_add", suffix_add);
  m.impl("suffix_release", suffix_release);
  m.impl("suffix_propose", suffix_propose);
  m.impl("stage_window", stage_window);
  m.impl("greedy_ids", greedy_ids);
  m.impl("draw", draw);
  m.impl("verify", verify);
  m.impl("verify_block", verify_block);
  m.impl("verify_greedy", verify_greedy);
  m.impl("commit", commit);
  m.impl("commit_greedy", commit_greedy);
  m.impl("rotary_attention", rotary_attention);
  m.impl("attention_block", attention_block);
  m.impl("mlp_block", mlp_block);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("mean", [](const Tensor& x) { return at::mean(x, {-1}, true); });
  m.impl("cos_sin", cos_sin);
  m.impl("cos", [](const Tensor& x) { return at::cos(x); });
  m.impl("sin", [](const Tensor& x) { return at::sin(x); });
  m.impl("tanh", [](const Tensor& x) { return at::tanh(x); });
  m.impl("torch_linear", [](const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    return at::linear(x, weight, bias);
  });
  m.impl("softmax", [](const Tensor& x, int64_t dim, std::optional<at::ScalarType> dtype) {
    return at::softmax(x, dim, dtype);
  });
  m.impl("sum", [](const Tensor& x, at::OptionalIntArrayRef dim, bool keepdim, std::optional<at::ScalarType> dtype) {
    return at::sum(x, dim, keepdim, dtype);
  });
  m.impl("gelu", [](const Tensor& x, c10::string_view approximate) { return at::gelu(x, approximate); });
  m.impl("layer_norm", [](const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
      double eps) {
    return at::layer_norm(x, {x.size(-1)}, weight, bias, eps);
  });
}
