// Mapping of threads to pairs and channels, also callable on the host: tests/ops/test_cuda.py.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MODAT_BOTH __host__ __device__
#else
#define MODAT_BOTH
#endif

namespace modat {

struct Mapping {
  int64_t pairs;       // (n, q, m), m fastest
  int group;           // threads per pair: a power of two, at most a warp
  int block_threads;   // threads per block: a multiple of 32

  Mapping() = default;
  Mapping(int64_t all, int channels, int vec, int threads) : pairs(all), group(1), block_threads(threads) {
    while (group < 32 && group * vec < channels) group *= 2;
  }

  MODAT_BOTH int64_t pairs_per_block() const { return block_threads / group; }
  MODAT_BOTH int64_t pair(unsigned block, unsigned thread) const { return block * pairs_per_block() + thread / group; }
  MODAT_BOTH int lane(unsigned thread) const { return int(thread % group); }
  // The lanes of the warp that belong to this thread's group.
  MODAT_BOTH unsigned mask(unsigned thread) const {
    const unsigned ones = group == 32 ? 0xffffffffu : (1u << group) - 1;
    return ones << (thread % 32 / group * group);
  }
  // Step of the grid-stride loop over pairs.
  MODAT_BOTH int64_t stride(unsigned grid) const { return grid * pairs_per_block(); }
  unsigned blocks() const {
    const int64_t wanted = (pairs + pairs_per_block() - 1) / pairs_per_block();
    constexpr int64_t most = 0x7fffffff;
    return unsigned(wanted < most ? wanted : most);
  }
};

}  // namespace modat
