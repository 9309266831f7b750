// C functions by which a compiled forward calls the operators without PyTorch's dispatcher. torch's compiler writes
// the calls: aoti_torch_cpu_NAME takes the arguments of specdec::NAME in order, a list as pointer and length, then a
// pointer for each result. cpu/__init__.py declares them (c_shims).
#pragma once

#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstdarg>

#include "attention.h"
#include "block.h"
#include "int4_linear.h"
#include "int8_linear.h"
#include "linear.h"
#include "norm.h"

namespace {

using torch::aot_inductor::new_tensor_handle;

inline Tensor& tensor_of(AtenTensorHandle handle) { return *reinterpret_cast<Tensor*>(handle); }

// The tensors of a list of handles, which own them: no reference is counted.
class Borrowed {
 public:
  Borrowed(const AtenTensorHandle* handles, int64_t count) {
    for (int64_t i = 0; i < count; ++i) tensors_.push_back(Traits::createBorrow(tensor_of(handles[i])));
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    for (Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
  }
  operator at::TensorList() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  c10::SmallVector<Tensor, 4> tensors_;
};

}  // namespace

extern "C" {

// After int8_inputs: an AtenTensorHandle* for the result of each weight.
AOTITorchError aoti_torch_cpu_int4_linear(AtenTensorHandle x, const AtenTensorHandle* packed, int64_t num_packed,
    const AtenTensorHandle* scales, int64_t num_scales, const int64_t* columns, int64_t num_columns,
    int32_t int8_inputs, ...) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    std::vector<Tensor> results = int4_linear(tensor_of(x), Borrowed(packed, num_packed),
        Borrowed(scales, num_scales), {columns, static_cast<size_t>(num_columns)}, int8_inputs);
    va_list handles;
    va_start(handles, int8_inputs);
    for (Tensor& result : results) *va_arg(handles, AtenTensorHandle*) = new_tensor_handle(std::move(result));
    va_end(handles);
  });
}

AOTITorchError aoti_torch_cpu_int8_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale,
    int32_t int8_inputs, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(::int8_linear(tensor_of(x), tensor_of(weight), tensor_of(scale), int8_inputs));
  });
}

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight, const AtenTensorHandle* bias,
    AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(
        ::linear(tensor_of(x), tensor_of(weight), bias ? std::optional(tensor_of(*bias)) : std::nullopt));
  });
}

AOTITorchError aoti_torch_cpu_rms_norm(AtenTensorHandle x, AtenTensorHandle weight, double eps,
    AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(::rms_norm(tensor_of(x), tensor_of(weight), eps));
  });
}

AOTITorchError aoti_torch_cpu_add_rms_norm(AtenTensorHandle x, AtenTensorHandle y, AtenTensorHandle weight, double eps,
    AtenTensorHandle* sum, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [total, normed] = add_rms_norm(tensor_of(x), tensor_of(y), tensor_of(weight), eps);
    *sum = new_tensor_handle(std::move(total));
    *result = new_tensor_handle(std::move(normed));
  });
}

AOTITorchError aoti_torch_cpu_cos_sin(AtenTensorHandle x, AtenTensorHandle* cos, AtenTensorHandle* sin) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [cosines, sines] = cos_sin(tensor_of(x));
    *cos = new_tensor_handle(std::move(cosines));
    *sin = new_tensor_handle(std::move(sines));
  });
}

AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
    AtenTensorHandle first, AtenTensorHandle last, double scale, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(attention(tensor_of(query), tensor_of(key), tensor_of(value), tensor_of(first),
        tensor_of(last), scale));
  });
}

AOTITorchError aoti_torch_cpu_rotary_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
    AtenTensorHandle cos, AtenTensorHandle sin, AtenTensorHandle positions, AtenTensorHandle intervals,
    AtenTensorHandle keys, AtenTensorHandle values, double scale, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(rotary_attention(tensor_of(query), tensor_of(key), tensor_of(value), tensor_of(cos),
        tensor_of(sin), tensor_of(positions), tensor_of(intervals), tensor_of(keys), tensor_of(values), scale));
  });
}

AOTITorchError aoti_torch_cpu_attention_block(AtenTensorHandle x, AtenTensorHandle residual,
    const AtenTensorHandle* weights, int64_t num_weights, const AtenTensorHandle* scales, int64_t num_scales,
    const int64_t* columns, int64_t num_columns, int32_t int8_inputs, AtenTensorHandle cos, AtenTensorHandle sin,
    AtenTensorHandle positions, AtenTensorHandle intervals, AtenTensorHandle keys, AtenTensorHandle values, double scale,
    AtenTensorHandle norm, double eps, AtenTensorHandle* sum, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [total, normed] = attention_block(tensor_of(x), tensor_of(residual), Borrowed(weights, num_weights),
        Borrowed(scales, num_scales), {columns, static_cast<size_t>(num_columns)}, int8_inputs, tensor_of(cos),
        tensor_of(sin), tensor_of(positions), tensor_of(intervals), tensor_of(keys), tensor_of(values), scale,
        tensor_of(norm), eps);
    *sum = new_tensor_handle(std::move(total));
    *result = new_tensor_handle(std::move(normed));
  });
}

AOTITorchError aoti_torch_cpu_mlp_block(AtenTensorHandle x, AtenTensorHandle residual, const AtenTensorHandle* weights,
    int64_t num_weights, const AtenTensorHandle* scales, int64_t num_scales, const int64_t* columns,
    int64_t num_columns, int32_t int8_inputs, AtenTensorHandle norm, double eps, AtenTensorHandle* sum,
    AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [total, normed] = mlp_block(tensor_of(x), tensor_of(residual), Borrowed(weights, num_weights),
        Borrowed(scales, num_scales), {columns, static_cast<size_t>(num_columns)}, int8_inputs, tensor_of(norm), eps);
    *sum = new_tensor_handle(std::move(total));
    *result = new_tensor_handle(std::move(normed));
  });
}

}  // extern "C"
