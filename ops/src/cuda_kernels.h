// What the CUDA binding and the CUDA kernels agree on. No torch here: nvcc compiles the kernels by themselves.
#pragma once

#include "kernel.h"

namespace modat {

constexpr int most_levels = 16;  // their sizes travel in the kernels' arguments

// Problem with pointers to device memory; `shapes` stays in host memory. `stream` is a cudaStream_t. Returns a
// cudaError_t. `grad_value_sum` is a zeroed (N, L, M, D) buffer of the work type that the backward pass adds into: the
// gradient itself for float32 and float64. With `deterministic` each of its rows has one owner; it is several times
// slower, as owners look at all queries.
int cuda_forward(const Problem& problem, Storage storage, void* stream);
int cuda_backward(const Problem& problem, Storage storage, void* grad_value_sum, bool deterministic, void* stream);

}  // namespace modat
