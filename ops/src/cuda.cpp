// The CUDA kernels as operators.
#include <ATen/Context.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda_kernels.h"
#include "library.h"

namespace modat {
namespace {

// Limits beyond those of Call.
void check_sizes(const Problem& p) {
  const auto check = [](const char* what, int64_t size, int64_t most) {
    TORCH_CHECK_VALUE(size <= most, "modat: the CUDA kernels take up to ", most, " ", what, ", got ", size,
                      "; use backend='torch'");
  };
  check("levels", p.levels, most_levels);
  check("points", p.points, most_points);
  check("heads", p.heads, most_heads);
  check("frames", p.batch, most_elements);
  check("queries", p.queries, most_elements);
  check("elements between queries", std::max({p.samples_q, p.weights_q, p.reference_q, p.reference_l, p.grad_out_q}),
        most_elements);
}

Tensor forward(Call call) {
  Problem& p = call.problem;
  check_sizes(p);
  const c10::cuda::CUDAGuard guard(call.value.device());
  Tensor out = at::empty({p.batch, p.queries, p.heads * p.channels}, call.value.options());
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(cuda_forward(p, storage_of(call.value), stream)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Call call, const Tensor& grad) {
  const c10::cuda::CUDAGuard guard(call.value.device());
  if (!call.value.is_contiguous()) {  // its rows have the offsets of the gradient's
    return backward(Call(call.value.contiguous(), call.shapes, call.samples, call.weights, call.reference), grad);
  }
  const bool ordered = at::globalContext().deterministicAlgorithms();
  Gradients grads(call, grad, ordered);
  const Problem& p = call.problem;
  check_sizes(p);
  if (p.batch * p.queries == 0) return {at::zeros_like(call.value), grads.samples, grads.weights};
  const auto work = call.value.options().dtype(work_type(call.value));
  const Tensor scratch = ordered ? at::empty(grads.weights.sizes(), work) : at::zeros(call.value.sizes(), work);
  void* const pointer = scratch.mutable_data_ptr();
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      cuda_backward(p, storage_of(call.value), ordered ? nullptr : pointer, ordered ? pointer : nullptr, stream)));
  return {ordered ? grads.value : scratch.to(call.value.scalar_type()), grads.samples, grads.weights};
}

}  // namespace
}  // namespace modat

TORCH_LIBRARY_IMPL(modat, CUDA, m) {
  modat::Operators<modat::forward, modat::backward>::enter(m);
}
