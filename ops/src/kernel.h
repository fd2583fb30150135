// Interface between the torch bindings and the kernels. No torch and no C++ library headers: the kernel files are compiled
// for instruction sets that the host may lack, so they must not share inline functions with the rest of the library.
#pragma once

#include <stdint.h>

namespace modat {

enum class Storage { f32, f64, bf16, f16 };

// One call. Strides are in elements; axes not named are contiguous. "Work type" is float, or double for double values.
struct Problem {
  int64_t batch, queries, heads, levels, points, channels, rows;  // N, Q, M, levels, points, D, L
  const int64_t* shapes;                                          // (levels, 2): height, width

  const void* value;  // (N, L, M, D)
  int64_t value_n, value_l, value_m;
  const void* samples;  // (N, Q, M, levels, points, 2): locations in [0, 1], or offsets in pixels where fused
  int64_t samples_n, samples_q;
  const void* weights;  // (N, Q, M, levels, points): attention weights, or logits where fused
  int64_t weights_n, weights_q;
  const void* reference;  // (N, Q, levels, 2) in [0, 1] where fused, else null
  int64_t reference_n, reference_q, reference_l;

  void* out;  // (N, Q, M, D)

  const void* grad_out;  // (N, Q, M, D)
  int64_t grad_out_n, grad_out_q;
  void* grad_value;    // (N, L, M, D)
  void* grad_samples;  // as samples, contiguous
  void* grad_weights;  // as weights, contiguous
};

// Dropout of `count` contiguous elements: those whose 16-bit number is below `threshold` become 0.
struct Masking {
  const void* in;
  void* out;
  int64_t count;
  uint64_t seed;
  uint32_t threshold;
  float scale;
};

// Kernels of one instruction set for one storage type. A range covers (n, m, q) in the forward pass and (n, m) slices in
// the backward pass; each range needs its own scratch, aligned to 64 bytes.
struct Kernels {
  const char* name;
  void (*forward)(const Problem&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Problem&, int64_t begin, int64_t end, void* scratch);
  int64_t (*forward_scratch)(const Problem&);   // bytes
  int64_t (*backward_scratch)(const Problem&);  // bytes
  void (*dropout)(const Masking&, int64_t begin, int64_t end);  // blocks of 32 elements; null for doubles
};

Kernels portable_kernels(Storage storage);
#if defined(__x86_64__)
Kernels avx2_kernels(Storage storage);
Kernels avx512_kernels(Storage storage);
#endif

}  // namespace modat
