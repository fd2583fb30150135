// Device functions of the CUDA kernels: packs of channels, samples and their tables, softmax.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace modat {
namespace {

constexpr int block_threads = 256, warp = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// Everything a kernel needs, by value. Distances are in elements.
struct Arguments {
  Problem p;  // pointers, and distances of frames
  int batch, queries, heads, channels, levels, points, count;  // count: levels * points
  int value_l, samples_q, weights_q, reference_q, reference_l, grad_out_q;
  int height[most_levels], width[most_levels], start[most_levels];  // start: first row of the level
  unsigned per_level;                                               // level = (sample + 1) * per_level >> 32
  void* grad_value_sum;  // zeroed, to be added into; or null: deterministic
  void* attention;       // (N, Q, M, levels, points) for the ordered kernel, or null
  int tile_rows[most_levels], first_tile[most_levels + 1], tile_bytes;  // of the ordered kernel
};

template <class T>
__device__ __forceinline__ T widen(T x) {
  return x;
}
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class Stored, class T>
__device__ __forceinline__ Stored narrow(T x) {
  return static_cast<Stored>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

template <class Stored, int Vec>
struct alignas(sizeof(Stored) * Vec) Pack {
  Stored at[Vec];
};

// Vec elements of an input, in the work type.
template <class T, class Stored, int Vec>
__device__ __forceinline__ void load(T (&into)[Vec], const void* from) {
  Pack<Stored, Vec> pack;
  if constexpr (sizeof(pack) == 16) {
    const int4 bits = __ldg(static_cast<const int4*>(from));
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack = *static_cast<const Pack<Stored, Vec>*>(from);
  }
#pragma unroll
  for (int v = 0; v < Vec; ++v) into[v] = widen(pack.at[v]);
}

template <class T, class Stored, int Vec>
__device__ __forceinline__ void store(Stored* to, const T (&from)[Vec]) {
  Pack<Stored, Vec> pack;
#pragma unroll
  for (int v = 0; v < Vec; ++v) pack.at[v] = narrow<Stored>(from[v]);
  if constexpr (sizeof(pack) == 16) {
    int4 bits;
    memcpy(&bits, &pack, sizeof pack);
    *reinterpret_cast<int4*>(to) = bits;
  } else {
    *reinterpret_cast<Pack<Stored, Vec>*>(to) = pack;
  }
}

template <class T, int Vec>
__device__ __forceinline__ void add(T* to, const T (&what)[Vec]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4 && Vec % 4 == 0) {
#pragma unroll
    for (int v = 0; v < Vec; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + v), make_float4(what[v], what[v + 1], what[v + 2], what[v + 3]));
    }
    return;
  }
#endif
#pragma unroll
  for (int v = 0; v < Vec; ++v) atomicAdd(to + v, what[v]);
}

// The pointer, but unknown to the compiler, which would otherwise repeat its 64-bit sum in every loop that uses it.
template <class Pointer>
__device__ __forceinline__ Pointer opaque(Pointer pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Inputs of a pair: samples (levels, points, 2), weights (levels, points), reference points (levels, 2) where fused.
template <class T>
struct Pair {
  const T *samples, *weights, *reference;
  __device__ __forceinline__ Pair(const Arguments& a, int64_t n, int q, int m) {
    const Problem& p = a.p;
    samples = (const T*)p.samples + n * p.samples_n + int64_t(q) * a.samples_q + 2 * m * a.count;
    weights = (const T*)p.weights + n * p.weights_n + int64_t(q) * a.weights_q + m * a.count;
    reference = p.reference ? (const T*)p.reference + n * p.reference_n + int64_t(q) * a.reference_q : nullptr;
  }
};

// One axis of a sample: the two pixels around it and their weights. An absent pixel has the index of its neighbour.
template <class T>
struct Axis {
  int first, second;
  bool has_first, has_second;
  T fraction;  // distance from the first pixel
  __device__ __forceinline__ Axis(T x, int size) {
    const T low = floor(x);
    first = int(low), second = first + 1;
    fraction = x - low;
    has_first = first >= 0, has_second = second < size;
    first = has_first ? first : second;
    second = has_second ? second : first;
  }
};

// The address step of one sample. Corners: top left, top right, bottom left, bottom right.
template <class T>
struct Corners {
  Axis<T> x, y;
  bool inside;  // whether any corner is in the level
  int start, width;
  T attention;
  __device__ __forceinline__ int row(int c) const {
    return start + (c / 2 ? y.second : y.first) * width + (c % 2 ? x.second : x.first);
  }
  __device__ __forceinline__ bool has(int c) const {
    return (c / 2 ? y.has_second : y.has_first) && (c % 2 ? x.has_second : x.has_first);
  }
};

template <class T>
__device__ __forceinline__ Corners<T> corners(const Arguments& a, const Pair<T>& pair, int sample, int level, T attention) {
  const int width = a.width[level], height = a.height[level];
  T x = pair.samples[2 * sample], y = pair.samples[2 * sample + 1];
  if (pair.reference != nullptr) {
    const T* reference = pair.reference + level * a.reference_l;
    x += reference[0] * T(width) - T(0.5);
    y += reference[1] * T(height) - T(0.5);
  } else {
    x = x * T(width) - T(0.5);
    y = y * T(height) - T(0.5);
  }
  const bool inside = x > T(-1) && y > T(-1) && x < T(width) && y < T(height);  // not for NaN
  const Axis<T> columns(inside ? x : T(0), width), lines(inside ? y : T(0), height);
  return {columns, lines, inside, a.start[level], width, attention};
}

// Entry of a table.
template <class T>
struct alignas(16) Sample {
  unsigned offset[4];  // elements from the frame's first row
  T weight[4];
};

// An absent corner has weight 0. With Halved it has half of its neighbour's weight instead, whose row it has: the sum is the
// same, and 0 times infinity does not occur.
template <bool Halved, class T>
__device__ __forceinline__ Sample<T> entry(const Corners<T>& own, int row_length) {
  T x[2] = {T(1) - own.x.fraction, own.x.fraction}, y[2] = {T(1) - own.y.fraction, own.y.fraction};
  const auto absent = [](const Axis<T>& axis, T(&weight)[2]) {
    if (!axis.has_first) weight[0] = Halved ? weight[1] *= T(0.5) : T(0);
    if (!axis.has_second) weight[1] = Halved ? weight[0] *= T(0.5) : T(0);
  };
  absent(own.x, x), absent(own.y, y);
  Sample<T> result;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    result.offset[c] = own.row(c) * row_length;
    result.weight[c] = own.inside ? own.attention * y[c / 2] * x[c % 2] : T(0);
  }
  return result;
}

template <int Group, class T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int step = Group / 2; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

// Maximum and sum of exponentials of a pair's logits; without fusion, weights are taken as they are.
template <class T>
struct Softmax {
  T high, scale;
  bool fused;
  __device__ __forceinline__ T operator()(T logit) const { return fused ? exp(logit - high) * scale : logit; }
};

template <int Group, class T>
__device__ __forceinline__ Softmax<T> softmax(const Arguments& a, const Pair<T>& pair, int lane) {
  if (pair.reference == nullptr) return {T(0), T(1), false};
  T high = -INFINITY, sum = 0;
#pragma unroll 1
  for (int k = lane; k < a.count; k += Group) high = pair.weights[k] > high ? pair.weights[k] : high;
#pragma unroll
  for (int step = Group / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(all_lanes, high, step);
    high = other > high ? other : high;
  }
#pragma unroll 1
  for (int k = lane; k < a.count; k += Group) sum += exp(pair.weights[k] - high);
  return {high, T(1) / group_sum<Group>(sum), true};
}

// Where a thread works.
template <int Group>
struct Place {
  int lane, q, m;
  bool live;  // false beyond the last query
  __device__ __forceinline__ explicit Place(const Arguments& a) {
    lane = int(threadIdx.x % Group), m = int(blockIdx.y);
    q = int(blockIdx.x * (block_threads / Group) + threadIdx.x / Group);
    live = q < a.queries;
    q = min(q, a.queries - 1);
  }
};

// This lane's sample of the round, and its slot in the group's table.
template <class T>
struct Own {
  Corners<T> corners;
  bool any;  // false beyond the last sample
  int slot, inside;  // inside: number of samples of the group inside of their level
};

template <int Group, bool Halved, class T>
__device__ __forceinline__ Own<T> fill(const Arguments& a, const Pair<T>& pair, const Softmax<T>& attention, int sample,
                                       int lane, Sample<T>* table) {
  const bool any = sample < a.count;
  sample = min(sample, a.count - 1);
  const int level = int(__umulhi(sample + 1, a.per_level));
  Own<T> own{corners<T>(a, pair, sample, level, attention(pair.weights[sample])), any, 0, 0};
  own.corners.inside &= any;
  constexpr unsigned ones = Group == warp ? all_lanes : (1u << Group) - 1;
  const unsigned votes = __ballot_sync(all_lanes, own.corners.inside) >> (threadIdx.x % warp / Group * Group) & ones;
  const int before = __popc(votes & ((1u << lane) - 1));
  own.inside = __popc(votes);
  own.slot = own.corners.inside ? before : own.inside + lane - before;
  table[own.slot] = entry<Halved>(own.corners, a.value_l);
  __syncwarp();
  return own;
}

}  // namespace
}  // namespace modat
