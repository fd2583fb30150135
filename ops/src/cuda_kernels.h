// Interface between the CUDA binding and the CUDA kernels. No torch headers: nvcc compiles the kernels alone.
#pragma once

#include "kernel.h"

namespace modat {

// Level sizes are kernel arguments, a sample's level is found by a 32-bit product, heads are an axis of the grid, and offsets
// inside of a frame have 32 bits.
constexpr int most_levels = 16, most_points = 8192, most_heads = 65535, most_elements = 1 << 30;

// Problem with pointers to device memory; `shapes` stays in host memory. `stream` is a cudaStream_t. Returns a
// cudaError_t. The backward pass takes one of two buffers of the work type, the other is null:
// `grad_value_sum`, (N, L, M, D), zeroed: gets the gradient of value by atomic additions; p.grad_value is not used.
// `attention`, (N, Q, M, levels, points): scratch of the deterministic form, which writes p.grad_value.
int cuda_forward(const Problem& problem, Storage storage, void* stream);
int cuda_backward(const Problem& problem, Storage storage, void* grad_value_sum, void* attention, void* stream);

}  // namespace modat
