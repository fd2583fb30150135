// The CUDA kernels as operators.
#include <ATen/Context.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "cuda_kernels.h"
#include "library.h"

namespace modat {
namespace {

void check_levels(const Problem& p) {
  TORCH_CHECK_VALUE(p.levels <= most_levels, "modat: the CUDA kernels take up to ", most_levels, " levels, got ", p.levels,
                    "; use backend='torch'");
}

Tensor forward(Call call) {
  Problem& p = call.problem;
  check_levels(p);
  const c10::cuda::CUDAGuard guard(call.value.device());
  Tensor out = at::empty({p.batch, p.queries, p.heads * p.channels}, call.value.options());
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(cuda_forward(p, storage_of(call.value), stream)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Call call, const Tensor& grad) {
  check_levels(call.problem);
  const c10::cuda::CUDAGuard guard(call.value.device());
  Gradients grads(call, grad, false);
  const Problem& p = call.problem;
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  std::vector<int64_t> sizes = call.value.sizes().vec();
  sizes.insert(sizes.begin(), deterministic ? ordered_slices(p) : 1);
  const Tensor sum = at::zeros(sizes, call.value.options().dtype(work_type(call.value)));
  if (p.batch * p.queries > 0) {
    void* stream = c10::cuda::getCurrentCUDAStream().stream();
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        cuda_backward(p, storage_of(call.value), sum.mutable_data_ptr(), deterministic, stream)));
  }
  const Tensor value = sizes[0] == 1 ? sum.squeeze(0) : sum.sum(0);
  return {value.to(call.value.scalar_type()), grads.samples, grads.weights};
}

}  // namespace
}  // namespace modat

TORCH_LIBRARY_IMPL(modat, CUDA, m) {
  modat::Operators<modat::forward, modat::backward>::enter(m);
}
