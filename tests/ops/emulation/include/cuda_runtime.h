// Stands in for CUDA's header, as far as the kernels need it.
#pragma once
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#if __CUDA_ARCH__ >= 900  // as on the device: older ones have no vector atomics
inline float4 atomicAdd(float4* to, float4 what) {
  if (uintptr_t(to) % alignof(float4)) emu::stop("an unaligned vector atomic");
  ++emu::counts.atomics;
  const float4 was = *to;
  *to = {was.x + what.x, was.y + what.y, was.z + what.z, was.w + what.w};
  return was;
}
#endif
