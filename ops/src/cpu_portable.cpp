// Kernels for any processor: vectors of 16 bytes, which every 64-bit processor has (SSE2, NEON).
#include "kernel.h"

#define MODAT_NAME "portable"
#define MODAT_WIDTH 4
#define MODAT_REGISTERS 16

namespace modat {
namespace portable {

#include "kernels.inl"

}  // namespace portable

Kernels portable_kernels(Storage storage) { return portable::kernels_of(storage); }

}  // namespace modat

