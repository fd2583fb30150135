// CUDA's execution model on a CPU: each thread of a block is a fiber, blocks run one after another. A fiber runs until a
// warp function (shuffle, ballot, __syncwarp) or a barrier; a warp function is carried out once every lane that its mask
// names has called it. What CUDA leaves undefined ends the launch with an exception: a mask that lacks the caller, or names
// a lane that has ended or waits elsewhere; lanes that meet in different functions or with different masks; a shuffle from
// a lane outside of the mask; a barrier that some threads never reach; a vector atomic at an unaligned address.
// Shared memory is NaN (bytes 0xff) at the start of each block.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <stdexcept>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emu {

enum class Call { none, shuffle, shuffle_xor, ballot, syncwarp, barrier, ended };

// Number of calls since the process started.
struct Counts {
  int64_t launches, atomics;
};
extern Counts counts;

// kernel<<<grid, block, shared, stream>>>(arguments) is rewritten to this; `body` calls the kernel.
void launch(dim3 grid, dim3 block, size_t shared, const void* stream, const std::function<void()>& body);
// `extern __shared__` arrays are rewritten to this; exactly the bytes given at the launch.
unsigned char* shared_memory();
// Called by a fiber: waits until the other lanes (threads of the block for a barrier) have arrived.
void collective(Call call, unsigned mask, const void* value, void* result, size_t size, int operand, int width);
// Called by a fiber: ends the launch with an exception.
[[noreturn]] void stop(const char* problem);

template <class T>
T exchange(Call call, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= 16);
  T result = value;
  collective(call, mask, &value, &result, sizeof(T), operand, width);
  return result;
}

template <class T>
T add(T* to, T what) {
  ++counts.atomics;
  const T before = *to;
  *to = before + what;
  return before;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emu::exchange(emu::Call::shuffle, mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu::exchange(emu::Call::shuffle_xor, mask, value, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::exchange(emu::Call::ballot, mask, 0u, predicate != 0, 32);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::collective(emu::Call::syncwarp, mask, nullptr, nullptr, 0, 0, 32); }
inline void __syncthreads() { emu::collective(emu::Call::barrier, ~0u, nullptr, nullptr, 0, 0, 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float atomicAdd(float* to, float what) { return emu::add(to, what); }
inline double atomicAdd(double* to, double what) { return emu::add(to, what); }
