// Kernels for processors with AVX-512 (F, DQ, BW, VL: Intel Skylake-SP, AMD Zen 4 and newer).
#include "kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>

#define MODAT_AVX512
#define MODAT_NAME "avx512"
#define MODAT_WIDTH 16
#define MODAT_REGISTERS 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

namespace modat {
namespace avx512 {

#include "kernels.inl"

}  // namespace avx512

Kernels avx512_kernels(Storage storage) { return avx512::kernels_of(storage); }

}  // namespace modat

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
