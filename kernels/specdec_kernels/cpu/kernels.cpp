// The operators of a decoding forward on a CPU: 4-bit and dense linear layers, norms, attention.
//
// A row's result does not depend on the number of rows of a call, on its index, or on the number of threads: each
// output is summed in one fixed order. So verifying a draft's tokens together gives the same bits as computing them one
// by one.
//
// specdec_kernels/cpu/__init__.py declares and documents the operators and builds this file.

#include "attention.h"
#include "int4_linear.h"
#include "linear.h"
#include "norm.h"
#include "shims.h"

TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("int4_linear", int4_linear);
  m.impl("linear", linear);
  m.impl("attention", attention);
  m.impl("rotary_attention", rotary_attention);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("mean", [](const Tensor& x) { return at::mean(x, {-1}, true); });
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
