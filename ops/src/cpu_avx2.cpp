// Kernels for processors with AVX2, FMA and F16C (Intel Haswell, AMD Zen and newer).
#include "kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>

#define MODAT_AVX2
#define MODAT_NAME "avx2"
#define MODAT_WIDTH 8
#define MODAT_REGISTERS 16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace modat {
namespace avx2 {

#include "kernels.inl"

}  // namespace avx2

Kernels avx2_kernels(Storage storage) { return avx2::kernels_of(storage); }

}  // namespace modat

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
