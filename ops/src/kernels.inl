// The kernels of one instruction set. The including file opens a namespace, sets the target and defines MODAT_WIDTH
// (floats in a vector), MODAT_REGISTERS and MODAT_NAME.

#include "simd.h"

#include "samples.h"

#include "forward.h"

#include "backward.h"

#include "dropout.h"

template <class T, int W, class Stored>
Kernels kernels() {
  Kernels all{MODAT_NAME,
              forward<T, W, Stored>,
              backward<T, W, Stored>,
              forward_scratch<T, W, Stored>,
              backward_scratch<T, W>,
              nullptr};
  if constexpr (sizeof(T) == 4) all.dropout = dropout<W, Stored>;
  return all;
}

Kernels kernels_of(Storage storage) {
  constexpr int doubles = MODAT_WIDTH >= 8 ? MODAT_WIDTH / 2 : 4;  // the four corner products must fill a vector
  switch (storage) {
    case Storage::f64:
      return kernels<double, doubles, double>();
    case Storage::bf16:
      return kernels<float, MODAT_WIDTH, BFloat16>();
    case Storage::f16:
      return kernels<float, MODAT_WIDTH, Half>();
    default:
      return kernels<float, MODAT_WIDTH, float>();
  }
}
