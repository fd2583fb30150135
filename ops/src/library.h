// C++ signatures of the operators, and construction of a Problem from tensors. Shared by the CPU and CUDA bindings.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "kernel.h"

namespace modat {

using at::Tensor;

inline at::ScalarType work_type(const Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Storage storage_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat:
      return Storage::f32;
    case at::kDouble:
      return Storage::f64;
    case at::kBFloat16:
      return Storage::bf16;
    case at::kHalf:
      return Storage::f16;
    default:
      TORCH_CHECK_TYPE(false, "modat: value must be float32, float64, bfloat16 or float16, got ", value.scalar_type());
  }
}

// Whether the axes after the first `free` are contiguous.
inline bool dense_behind(const Tensor& tensor, int64_t free) {
  int64_t expected = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= free; --axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

// The tensors of a Problem, copied only if the kernels do not support their strides.
struct Call {
  Tensor value, samples, weights, reference;
  at::IntArrayRef shapes;
  Problem problem;

  // `reference` is undefined for the plain form, else (N, Q, levels, 2), expanded axes allowed.
  Call(const Tensor& value_in, at::IntArrayRef shapes_in, const Tensor& samples_in, const Tensor& weights_in,
       const Tensor& reference_in)
      : value(dense_behind(value_in, 3) ? value_in : value_in.contiguous()),
        samples(dense_behind(samples_in, 2) ? samples_in : samples_in.contiguous()),
        weights(dense_behind(weights_in, 2) ? weights_in : weights_in.contiguous()),
        reference(reference_in.defined() && !dense_behind(reference_in, 3) ? reference_in.contiguous() : reference_in),
        shapes(shapes_in),
        problem{} {
    check();
    constexpr int64_t most = 1 << 30;  // offsets inside one frame are 32-bit numbers, and larger ones mean "outside"
    if (value.stride(1) * value.size(1) > most) value = value.contiguous();
    const int64_t frame = value.size(1) * std::max<int64_t>(value.size(2) * value.size(3), 16);  // packed: whole vectors
    TORCH_CHECK_VALUE(frame <= most, "modat: one frame of value has L * M * D = ", frame, " numbers, the kernels take ", most,
                      "; use backend='torch'");
    Problem& p = problem;
    p.batch = value.size(0), p.rows = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
    p.queries = samples.size(1), p.levels = samples.size(3), p.points = samples.size(4);
    p.shapes = shapes.data();
    p.value = value.const_data_ptr();
    p.value_n = value.stride(0), p.value_l = value.stride(1), p.value_m = value.stride(2);
    p.samples = samples.const_data_ptr();
    p.samples_n = samples.stride(0), p.samples_q = samples.stride(1);
    p.weights = weights.const_data_ptr();
    p.weights_n = weights.stride(0), p.weights_q = weights.stride(1);
    if (reference.defined()) {
      p.reference = reference.const_data_ptr();
      p.reference_n = reference.stride(0), p.reference_q = reference.stride(1);
      p.reference_l = p.levels == 1 ? 0 : reference.stride(2);
    }
  }

 private:
  // ops/functional.py reports user errors; these checks keep the kernels within their memory for any caller.
  void check() const {
    TORCH_CHECK_VALUE(value.dim() == 4 && samples.dim() == 6 && weights.dim() == 5, "modat: value, samples, weights have ",
                      value.dim(), ", ", samples.dim(), ", ", weights.dim(), " axes instead of 4, 6, 5");
    int64_t area = 0;
    for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
      TORCH_CHECK_VALUE(shapes[i] > 0 && shapes[i + 1] > 0, "modat: spatial_shapes ", shapes, " has an empty level");
      area += shapes[i] * shapes[i + 1];
    }
    const auto levels = static_cast<int64_t>(shapes.size() / 2);
    TORCH_CHECK_VALUE(shapes.size() % 2 == 0 && levels > 0 && area == value.size(1), "modat: spatial_shapes ", shapes,
                      " do not add up to the L = ", value.size(1), " rows of value");
    TORCH_CHECK_VALUE(samples.size(0) == value.size(0) && samples.size(2) == value.size(2) && samples.size(3) == levels &&
                          samples.size(4) > 0 && samples.size(5) == 2 && value.size(2) > 0 && value.size(3) > 0,
                      "modat: samples ", samples.sizes(), " do not fit value ", value.sizes(), " and ", levels, " levels");
    TORCH_CHECK_VALUE(weights.sizes() == samples.sizes().slice(0, 5), "modat: weights ", weights.sizes(),
                      " do not fit samples ", samples.sizes());
    check_like(samples, "samples");
    check_like(weights, "weights");
    if (!reference.defined()) return;
    TORCH_CHECK_VALUE(reference.dim() == 4 && reference.size(0) == samples.size(0) &&
                          reference.size(1) == samples.size(1) && reference.size(2) == levels && reference.size(3) == 2,
                      "modat: reference points ", reference.sizes(), " do not fit samples ", samples.sizes());
    check_like(reference, "reference points");
  }

  void check_like(const Tensor& tensor, const char* name) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == work_type(value), "modat: ", name, " must be ", work_type(value), " beside ",
                     value.scalar_type(), " value, got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == value.device(), "modat: ", name, " is on ", tensor.device(), ", value on ",
                      value.device());
  }
};

// Outputs of the backward pass and the incoming gradient, set in the Problem.
struct Gradients {
  Tensor grad_out, value, samples, weights;

  // Without with_value the gradient of value is accumulated in another tensor.
  Gradients(Call& call, const Tensor& incoming, bool with_value) : grad_out(dense_behind(incoming, 2) ? incoming : incoming.contiguous()) {
    Problem& p = call.problem;
    TORCH_CHECK_VALUE(grad_out.dim() == 3 && grad_out.size(0) == p.batch && grad_out.size(1) == p.queries &&
                          grad_out.size(2) == p.heads * p.channels && grad_out.scalar_type() == call.value.scalar_type() &&
                          grad_out.device() == call.value.device(),
                      "modat: incoming gradient ", grad_out.sizes(), " ", grad_out.scalar_type(), " does not fit");
    constexpr auto dense = at::MemoryFormat::Contiguous;
    if (with_value) value = at::empty_like(call.value, dense);
    samples = at::empty_like(call.samples, dense);
    weights = at::empty_like(call.weights, dense);
    p.grad_out = grad_out.const_data_ptr();
    p.grad_out_n = grad_out.stride(0), p.grad_out_q = grad_out.stride(1);
    p.grad_value = with_value ? value.mutable_data_ptr() : nullptr;
    p.grad_samples = samples.mutable_data_ptr();
    p.grad_weights = weights.mutable_data_ptr();
  }
};

// The operators of a device, from its forward and backward functions.
template <Tensor (*Forward)(Call), std::tuple<Tensor, Tensor, Tensor> (*Backward)(Call, const Tensor&)>
struct Operators {
  static Tensor plain(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
    return Forward(Call(value, shapes, locations, weights, {}));
  }

  static Tensor fused(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference, const Tensor& offsets,
                      const Tensor& logits) {
    return Forward(Call(value, shapes, offsets, logits, reference));
  }

  static std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad, const Tensor& value, at::IntArrayRef shapes,
                                                           const Tensor& locations, const Tensor& weights) {
    return Backward(Call(value, shapes, locations, weights, {}), grad);
  }

  static std::tuple<Tensor, Tensor, Tensor> fused_backward(const Tensor& grad, const Tensor& value, at::IntArrayRef shapes,
                                                           const Tensor& reference, const Tensor& offsets,
                                                           const Tensor& logits) {
    return Backward(Call(value, shapes, offsets, logits, reference), grad);
  }

  static void enter(torch::Library& library) {
    library.impl("ms_deform_attn", plain);
    library.impl("ms_deform_attn_fused", fused);
    library.impl("ms_deform_attn_backward", plain_backward);
    library.impl("ms_deform_attn_fused_backward", fused_backward);
  }
};

}  // namespace modat
