// CUDA kernels, sm_75 and newer.
//
// A pair is one head of one query. A group of G threads works on a pair, each thread on Vec neighbouring channels (16
// bytes where D allows), stepping by G * Vec channels. The address step is done once per pair: thread i of the group takes
// samples i, i + G, ... of a round and passes its corners and weights to the others by shuffles. There is no shared
// memory and no barrier, and coordinates are read once. Sums are float32 (double for double), whatever the storage.
//
// A corner outside its level has the address -1 and is skipped by the whole group, without divergence,
// and data at the border cannot leak in.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "cuda_mapping.h"

namespace modat {
namespace {

constexpr int block_threads = 256;

// Everything a kernel needs, by value.
struct Arguments {
  Problem p;
  int height[most_levels], width[most_levels], start[most_levels];
  Mapping map;
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

template <class Stored, int Vec>
__device__ __forceinline__ Pack<Stored, Vec> load(const Stored* from) {
  return *reinterpret_cast<const Pack<Stored, Vec>*>(from);
}

// The address step of one sample.
template <class T>
struct Corners {
  int offset[4];  // rows of the frame's value: top left, top right, bottom left, bottom right; -1 where outside
  T attention, right, down;  // fractional offset from the first corner
  __device__ __forceinline__ T x(int corner) const { return corner % 2 ? right : T(1) - right; }
  __device__ __forceinline__ T y(int corner) const { return corner / 2 ? down : T(1) - down; }
};

// The two neighbours of pixel coordinate x on an axis of `size` pixels, -1 where outside; returns the fraction in between.
template <class T>
__device__ __forceinline__ T axis(T x, int size, int& first, int& second) {
  x = x > T(-2) ? x : T(-2);  // NaN too
  x = x < T(size + 1) ? x : T(size + 1);
  const T low = floor(x);
  first = int(low), second = first + 1;
  first = first < 0 || first >= size ? -1 : first;
  second = second < 0 || second >= size ? -1 : second;
  return x - low;
}

template <class T>
__device__ __forceinline__ Corners<T> corners(const Arguments& a, int64_t n, int64_t q, int m, int sample, T attention) {
  const Problem& p = a.p;
  const int count = int(p.levels * p.points);
  const int level = sample / int(p.points);
  const T* point = (const T*)p.samples + n * p.samples_n + q * p.samples_q + 2 * (int64_t(m) * count + sample);
  T x = point[0], y = point[1];
  const int width = a.width[level], height = a.height[level];
  if (p.reference != nullptr) {
    const T* reference = (const T*)p.reference + n * p.reference_n + q * p.reference_q + level * p.reference_l;
    x += reference[0] * T(width) - T(0.5);
    y += reference[1] * T(height) - T(0.5);
  } else {
    x = x * T(width) - T(0.5);
    y = y * T(height) - T(0.5);
  }
  Corners<T> c;
  c.attention = attention;
  int column[2], line[2];
  c.right = axis(x, width, column[0], column[1]);
  c.down = axis(y, height, line[0], line[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool inside = column[i % 2] >= 0 && line[i / 2] >= 0;
    c.offset[i] = inside ? a.start[level] + line[i / 2] * width + column[i % 2] : -1;
  }
  return c;
}

// Shuffles within a group: its lanes are consecutive and all participate.
template <class T>
__device__ __forceinline__ T from_lane(const Mapping& map, unsigned mask, T value, int lane) {
  return __shfl_sync(mask, value, lane, map.group);
}
template <class T>
__device__ __forceinline__ T group_sum(const Mapping& map, unsigned mask, T value) {
  for (int step = map.group / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step, map.group);
  return value;
}
template <class T>
__device__ __forceinline__ T group_max(const Mapping& map, unsigned mask, T value) {
  for (int step = map.group / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(mask, value, step, map.group);
    value = value > other ? value : other;
  }
  return value;
}

// Maximum and sum of exponentials of a pair's logits; without fusion 0 and 1 stand for "take the weights as they are".
template <class T>
struct Softmax {
  T high, scale;
  bool fused;
  __device__ __forceinline__ T operator()(T logit) const { return fused ? exp(logit - high) * scale : logit; }
};

template <class T>
__device__ __forceinline__ Softmax<T> softmax(const Arguments& a, const T* weights, int lane, unsigned mask) {
  const int count = int(a.p.levels * a.p.points);
  if (a.p.reference == nullptr) return {T(0), T(1), false};
  T high = -INFINITY, sum = 0;
  for (int k = lane; k < count; k += a.map.group) high = weights[k] > high ? weights[k] : high;
  high = group_max(a.map, mask, high);
  for (int k = lane; k < count; k += a.map.group) sum += exp(weights[k] - high);
  return {high, T(1) / group_sum(a.map, mask, sum), true};
}

template <class T, class Stored, int Vec>
__global__ void __launch_bounds__(block_threads) forward_kernel(const __grid_constant__ Arguments a) {
  const Problem& p = a.p;
  const Mapping& map = a.map;
  const int lane = map.lane(threadIdx.x);
  const unsigned mask = map.mask(threadIdx.x);
  const int count = int(p.levels * p.points);
  const int value_row = int(p.value_l);  // a frame is smaller than 2^31 numbers
  for (int64_t pair = map.pair(blockIdx.x, threadIdx.x); pair < map.pairs; pair += map.stride(gridDim.x)) {
    const int m = int(pair % p.heads);
    const int64_t row = pair / p.heads, n = row / p.queries, q = row % p.queries;
    const T* weights = (const T*)p.weights + n * p.weights_n + q * p.weights_q + int64_t(m) * count;
    const Softmax<T> attention = softmax<T>(a, weights, lane, mask);
    const Stored* value = (const Stored*)p.value + n * p.value_n + m * p.value_m;
    Stored* out = (Stored*)p.out + pair * p.channels;
    // All lanes take part in the shuffles; those past the channels neither load nor store.
    for (int first = 0; first < p.channels; first += map.group * Vec) {
      const int channel = first + lane * Vec;
      const bool mine = channel < p.channels;
      T sum[Vec] = {};
      for (int round = 0; round < count; round += map.group) {
        Corners<T> own{};
        T own_weight[4] = {};
        if (round + lane < count) {
          own = corners<T>(a, n, q, m, round + lane, attention(weights[round + lane]));
#pragma unroll
          for (int c = 0; c < 4; ++c) own_weight[c] = own.attention * own.y(c) * own.x(c);
        }
        const int here = min(map.group, count - round);
        for (int i = 0; i < here; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int offset = from_lane(map, mask, own.offset[c], i);
            const T weight = from_lane(map, mask, own_weight[c], i);
            if (mine && offset >= 0) {
              const auto corner = load<Stored, Vec>(value + offset * value_row + channel);
#pragma unroll
              for (int v = 0; v < Vec; ++v) sum[v] += weight * widen(corner.at[v]);
            }
          }
        }
      }
      if (mine) {
        Pack<Stored, Vec> result;
#pragma unroll
        for (int v = 0; v < Vec; ++v) result.at[v] = narrow<Stored>(sum[v]);
        *reinterpret_cast<Pack<Stored, Vec>*>(out + channel) = result;
      }
    }
  }
}

template <class T, int Vec>
__device__ __forceinline__ void add(T* to, const T* what) {
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4 && Vec == 8) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(what[0], what[1], what[2], what[3]));
    atomicAdd(reinterpret_cast<float4*>(to) + 1, make_float4(what[4], what[5], what[6], what[7]));
    return;
  }
  if constexpr (sizeof(T) == 4 && Vec == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(what[0], what[1], what[2], what[3]));
    return;
  }
#endif
#pragma unroll
  for (int v = 0; v < Vec; ++v) atomicAdd(to + v, what[v]);
}

// Gradients of samples and weights; and of value, unless Deterministic, by atomic additions.
template <class T, class Stored, int Vec, bool Deterministic>
__global__ void __launch_bounds__(block_threads) backward_kernel(const __grid_constant__ Arguments a, T* grad_value_sum) {
  const Problem& p = a.p;
  const Mapping& map = a.map;
  const int lane = map.lane(threadIdx.x);
  const unsigned mask = map.mask(threadIdx.x);
  const int count = int(p.levels * p.points);
  const int value_row = int(p.value_l), grad_row = int(p.heads * p.channels);  // a frame is smaller than 2^31 numbers
  for (int64_t pair = map.pair(blockIdx.x, threadIdx.x); pair < map.pairs; pair += map.stride(gridDim.x)) {
    const int m = int(pair % p.heads);
    const int64_t row = pair / p.heads, n = row / p.queries, q = row % p.queries;
    const T* weights = (const T*)p.weights + n * p.weights_n + q * p.weights_q + int64_t(m) * count;
    const Softmax<T> attention = softmax<T>(a, weights, lane, mask);
    const Stored* value = (const Stored*)p.value + n * p.value_n + m * p.value_m;
    const Stored* grad_out = (const Stored*)p.grad_out + n * p.grad_out_n + q * p.grad_out_q + m * p.channels;
    T* grad_value = grad_value_sum + (n * p.rows * p.heads + m) * p.channels;
    T* grad_samples = (T*)p.grad_samples + 2 * pair * count;
    T* grad_weights = (T*)p.grad_weights + pair * count;
    T mean = 0;  // of the weights' gradients, by attention: the softmax's backward
    for (int round = 0; round < count; round += map.group) {
      Corners<T> own{};
      const bool has_sample = round + lane < count;
      if (has_sample) own = corners<T>(a, n, q, m, round + lane, attention(weights[round + lane]));
      T dot[4] = {};  // <corner, grad_out> of this lane's own sample
      const int here = min(map.group, count - round);
      for (int i = 0; i < here; ++i) {
        const T y[2] = {from_lane(map, mask, own.attention * own.y(0), i), from_lane(map, mask, own.attention * own.y(2), i)};
        const T x[2] = {from_lane(map, mask, own.x(0), i), from_lane(map, mask, own.x(1), i)};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int offset = from_lane(map, mask, own.offset[c], i);
          const T weight = y[c / 2] * x[c % 2];
          T part = 0;
          for (int channel = lane * Vec; offset >= 0 && channel < p.channels; channel += map.group * Vec) {
            const auto corner = load<Stored, Vec>(value + offset * value_row + channel);
            const auto incoming = load<Stored, Vec>(grad_out + channel);
            T gradient[Vec];
#pragma unroll
            for (int v = 0; v < Vec; ++v) {
              part += widen(corner.at[v]) * widen(incoming.at[v]);
              gradient[v] = weight * widen(incoming.at[v]);
            }
            if (!Deterministic) add<T, Vec>(grad_value + offset * grad_row + channel, gradient);
          }
          part = group_sum(map, mask, part);
          if (lane == i) dot[c] = part;
        }
      }
      if (has_sample) {
        const int k = round + lane, level = k / int(p.points);
        // Products with absent corners are 0.
        const T left = own.y(0) * dot[0] + own.y(2) * dot[2], right = own.y(0) * dot[1] + own.y(2) * dot[3];
        const T top = own.x(0) * dot[0] + own.x(1) * dot[1], bottom = own.x(0) * dot[2] + own.x(1) * dot[3];
        const bool fused = attention.fused;
        grad_samples[2 * k] = own.attention * (right - left) * (fused ? T(1) : T(a.width[level]));
        grad_samples[2 * k + 1] = own.attention * (bottom - top) * (fused ? T(1) : T(a.height[level]));
        const T gradient = own.x(0) * left + own.x(1) * right;
        grad_weights[k] = gradient;
        mean += own.attention * gradient;
      }
    }
    if (attention.fused) {
      mean = group_sum(map, mask, mean);
      for (int k = lane; k < count; k += map.group) grad_weights[k] = attention(weights[k]) * (grad_weights[k] - mean);
    }
  }
}

// The gradient of value in a fixed order: a thread owns one channel of one (n, m) and walks over a slice of the queries,
// gridDim.y in all, into the buffer of that slice.
template <class T, class Stored>
__global__ void __launch_bounds__(block_threads) ordered_kernel(const __grid_constant__ Arguments a, T* grad_value_sum) {
  const Problem& p = a.p;
  const int64_t owner = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (owner >= p.batch * p.heads * p.channels) return;
  const int channel = int(owner % p.channels), m = int(owner / p.channels % p.heads);
  const int64_t n = owner / p.channels / p.heads;
  const int count = int(p.levels * p.points);
  const int64_t slice = blockIdx.y, slices = gridDim.y;
  T* grad_value = grad_value_sum + ((slice * p.batch + n) * p.rows * p.heads + m) * p.channels + channel;
  const int64_t end = p.queries * (slice + 1) / slices;
  for (int64_t q = p.queries * slice / slices; q < end; ++q) {
    const T* weights = (const T*)p.weights + n * p.weights_n + q * p.weights_q + int64_t(m) * count;
    Softmax<T> attention{T(0), T(1), p.reference != nullptr};
    if (attention.fused) {
      T high = -INFINITY, sum = 0;
      for (int k = 0; k < count; ++k) high = weights[k] > high ? weights[k] : high;
      for (int k = 0; k < count; ++k) sum += exp(weights[k] - high);
      attention.high = high, attention.scale = T(1) / sum;
    }
    const T incoming =
        widen(((const Stored*)p.grad_out)[n * p.grad_out_n + q * p.grad_out_q + m * p.channels + channel]);
    for (int k = 0; k < count; ++k) {
      const Corners<T> own = corners<T>(a, n, q, m, k, attention(weights[k]));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (own.offset[c] < 0) continue;
        grad_value[own.offset[c] * p.heads * p.channels] += own.attention * own.y(c) * own.x(c) * incoming;
      }
    }
  }
}

Arguments arguments_of(const Problem& p, int vec) {
  Arguments a{};
  a.p = p;
  int start = 0;
  for (int level = 0; level < p.levels; ++level) {
    a.height[level] = int(p.shapes[2 * level]), a.width[level] = int(p.shapes[2 * level + 1]);
    a.start[level] = start;
    start += a.height[level] * a.width[level];
  }
  a.p.shapes = nullptr;
  a.map = Mapping(p.batch * p.queries * p.heads, int(p.channels), vec, block_threads);
  return a;
}

// The widest pack that channels, strides and addresses allow, at most 16 bytes.
template <class Stored>
int pack_width(const Problem& p, bool backward) {
  for (int vec = int(16 / sizeof(Stored)); vec > 1; vec /= 2) {
    const auto fits = [&](const void* pointer, int64_t a, int64_t b, int64_t c) {
      return uintptr_t(pointer) % (vec * sizeof(Stored)) == 0 && a % vec == 0 && b % vec == 0 && c % vec == 0;
    };
    if (p.channels % vec == 0 && fits(p.value, p.value_n, p.value_l, p.value_m) &&
        (backward ? fits(p.grad_out, p.grad_out_n, p.grad_out_q, 0) : fits(p.out, 0, 0, 0))) {
      return vec;
    }
  }
  return 1;
}

template <class T, class Stored, int Vec>
cudaError_t launch_forward(const Problem& p, cudaStream_t stream) {
  const Arguments a = arguments_of(p, Vec);
  forward_kernel<T, Stored, Vec><<<a.map.blocks(), block_threads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, class Stored, int Vec>
cudaError_t launch_backward(const Problem& p, T* sum, bool deterministic, cudaStream_t stream) {
  const Arguments a = arguments_of(p, Vec);
  if (deterministic) {
    backward_kernel<T, Stored, Vec, true><<<a.map.blocks(), block_threads, 0, stream>>>(a, sum);
    const int64_t owners = p.batch * p.heads * p.channels;
    const dim3 grid(unsigned((owners + block_threads - 1) / block_threads), unsigned(ordered_slices(p)));
    ordered_kernel<T, Stored><<<grid, block_threads, 0, stream>>>(a, sum);
  } else {
    backward_kernel<T, Stored, Vec, false><<<a.map.blocks(), block_threads, 0, stream>>>(a, sum);
  }
  return cudaGetLastError();
}

template <class T, class Stored>
cudaError_t forward_of(const Problem& p, cudaStream_t stream) {
  switch (pack_width<Stored>(p, false)) {
    case 8:
      if constexpr (sizeof(Stored) == 2) return launch_forward<T, Stored, 8>(p, stream);
      [[fallthrough]];
    case 4:
      if constexpr (sizeof(Stored) <= 4) return launch_forward<T, Stored, 4>(p, stream);
      [[fallthrough]];
    case 2:
      return launch_forward<T, Stored, 2>(p, stream);
    default:
      return launch_forward<T, Stored, 1>(p, stream);
  }
}

template <class T, class Stored>
cudaError_t backward_of(const Problem& p, void* sum, bool deterministic, cudaStream_t stream) {
  T* into = static_cast<T*>(sum);
  switch (pack_width<Stored>(p, true)) {
    case 8:
      if constexpr (sizeof(Stored) == 2) return launch_backward<T, Stored, 8>(p, into, deterministic, stream);
      [[fallthrough]];
    case 4:
      if constexpr (sizeof(Stored) <= 4) return launch_backward<T, Stored, 4>(p, into, deterministic, stream);
      [[fallthrough]];
    case 2:
      return launch_backward<T, Stored, 2>(p, into, deterministic, stream);
    default:
      return launch_backward<T, Stored, 1>(p, into, deterministic, stream);
  }
}

}  // namespace

int cuda_forward(const Problem& p, Storage storage, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (storage) {
    case Storage::f64:
      return forward_of<double, double>(p, stream);
    case Storage::bf16:
      return forward_of<float, __nv_bfloat16>(p, stream);
    case Storage::f16:
      return forward_of<float, __half>(p, stream);
    default:
      return forward_of<float, float>(p, stream);
  }
}

int cuda_backward(const Problem& p, Storage storage, void* sum, bool deterministic, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (storage) {
    case Storage::f64:
      return backward_of<double, double>(p, sum, deterministic, stream);
    case Storage::bf16:
      return backward_of<float, __nv_bfloat16>(p, sum, deterministic, stream);
    case Storage::f16:
      return backward_of<float, __half>(p, sum, deterministic, stream);
    default:
      return backward_of<float, float>(p, sum, deterministic, stream);
  }
}

}  // namespace modat
