// Interface between the CUDA binding and the CUDA kernels. No torch headers: nvcc compiles the kernels alone.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace modat {

constexpr int most_levels = 16;  // level sizes are kernel arguments

// Number of slices of the queries in the deterministic backward pass, where one thread owns each element of the value's
// gradient per slice: enough for a GPU's threads. It depends on the sizes only, and so does the order of summation.
inline int64_t ordered_slices(const Problem& p) {
  constexpr int64_t enough = 1 << 14, most = 8;
  const int64_t owners = std::max<int64_t>(1, p.batch * p.heads * p.channels);
  return std::clamp<int64_t>(enough / owners, 1, std::min(most, std::max<int64_t>(1, p.queries)));
}

// Problem with pointers to device memory; `shapes` stays in host memory. `stream` is a cudaStream_t. Returns a
// cudaError_t. `grad_value_sum` is a zeroed buffer of the work type that the backward pass adds into: (N, L, M, D), the
// gradient itself for float32 and float64; with `deterministic` (ordered_slices, N, L, M, D), whose sum it is.
int cuda_forward(const Problem& problem, Storage storage, void* stream);
int cuda_backward(const Problem& problem, Storage storage, void* grad_value_sum, bool deterministic, void* stream);

}  // namespace modat
