// CUDA kernels, sm_75 and newer.
//
// A pair is one head of one query. A group of Group lanes works on a pair, each lane on Vec neighbouring channels (16 bytes
// where D allows). The lanes of a group share the work of a sample's table: lane i finds the rows and weights of the corners
// of sample i, i + Group, ..., and all lanes read them from shared memory. Samples outside of their level come last in the
// table. blockIdx is (tile of queries, head, frame), so a block reads neighbouring rows of one head.
//
// All lanes of a warp take the same path, so warp functions name all of them; groups beyond the last query repeat it and
// write nothing. Sums are float32 (double for double), whatever the storage.
#include <algorithm>

#include "cuda_samples.h"

namespace modat {
namespace {

// The launch bounds keep half of the threads of an SM, or five eighths (48 registers), without spills.
template <class T, class Stored, int Vec, int Group>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : Vec == 8 ? 4 : 5)
forward_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const Problem& p = a.p;
  const Place<Group> at(a);
  Sample<T>* table = reinterpret_cast<Sample<T>*>(shared_bytes) + (threadIdx.x - at.lane);
  const int channels = a.channels;
  for (int n = blockIdx.z; n < a.batch; n += gridDim.z) {
    const Pair<T> pair(a, n, at.q, at.m);
    const Softmax<T> attention = softmax<Group>(a, pair, at.lane);
    const Stored* value = (const Stored*)p.value + n * p.value_n + at.m * p.value_m;
    Stored* out = (Stored*)p.out + ((int64_t(n) * a.queries + at.q) * a.heads + at.m) * channels;
    for (int first = 0; first < channels; first += Group * Vec) {
      const int channel = first + at.lane * Vec;
      const bool mine = channel < channels;
      const Stored* column = opaque(value + (mine ? channel : 0));
      T sum[Vec] = {};
#pragma unroll 1
      for (int round = 0; round < a.count; round += Group) {
        const int inside = fill<Group, true>(a, pair, attention, round + at.lane, at.lane, table).inside;
#pragma unroll 1
        for (int i = 0; i < inside; ++i) {
          const Sample<T> sample = table[i];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            T corner[Vec];
            load<T, Stored>(corner, column + sample.offset[c]);
#pragma unroll
            for (int v = 0; v < Vec; ++v) sum[v] += sample.weight[c] * corner[v];
          }
        }
        __syncwarp();
      }
      if (at.live && mine) store<T, Stored>(out + channel, sum);
    }
  }
}

// Sums four numbers over a group; lane i of the group returns sum 4 * i / Group. The first two steps halve the numbers.
template <int Group, class T>
__device__ __forceinline__ T sum_of_four(const T (&part)[4], int lane) {
  const bool upper = lane & Group / 2, odd = lane & Group / 4;
  T kept[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    kept[i] = upper ? part[2 + i] : part[i];
    kept[i] += __shfl_xor_sync(all_lanes, upper ? part[i] : part[2 + i], Group / 2);
  }
  const T sum = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(all_lanes, odd ? kept[0] : kept[1], Group / 4);
  return group_sum<Group / 4>(sum);
}

// Gradients of samples and weights; and of value, by atomic additions, unless deterministic: then the attention weights are
// stored for the ordered kernel.
template <class T, class Stored, int Vec, int Group>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 3 : 2)
backward_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  constexpr bool wide = Group == warp;  // else a group takes all channels at once
  const Problem& p = a.p;
  const Place<Group> at(a);
  Sample<T>* table = reinterpret_cast<Sample<T>*>(shared_bytes) + (threadIdx.x - at.lane);
  // <corner, grad_out> of each corner, by slot of the table.
  T(*dots)[4] = reinterpret_cast<T(*)[4]>(shared_bytes + block_threads * sizeof(Sample<T>)) + (threadIdx.x - at.lane);
  const int count = a.count, channels = a.channels;
  const bool adds = at.live && a.grad_value_sum != nullptr;
  for (int n = blockIdx.z; n < a.batch; n += gridDim.z) {
    const Pair<T> pair(a, n, at.q, at.m);
    const Softmax<T> attention = softmax<Group>(a, pair, at.lane);
    const int64_t index = (int64_t(n) * a.queries + at.q) * a.heads + at.m;
    const Stored* value = (const Stored*)p.value + n * p.value_n + at.m * p.value_m;
    const Stored* grad_out = (const Stored*)p.grad_out + n * p.grad_out_n + int64_t(at.q) * a.grad_out_q + at.m * channels;
    T* grad_value = (T*)a.grad_value_sum + (n * p.rows * p.heads + at.m) * p.channels;
    Pack<T, 2>* grad_samples = (Pack<T, 2>*)p.grad_samples + index * count;
    T* grad_weights = (T*)p.grad_weights + index * count;
    T incoming[Vec] = {};
    if (!wide && at.lane * Vec < channels) load<T, Stored>(incoming, grad_out + at.lane * Vec);
    T mean = 0;  // of the gradients of the weights, by attention: the softmax's backward
#pragma unroll 1
    for (int round = 0; round < count; round += Group) {
      const int k = round + at.lane;
      const Own<T> own = fill<Group, false>(a, pair, attention, k, at.lane, table);
      int most = own.inside;  // of the warp's groups
#pragma unroll
      for (int step = Group; step < warp; step *= 2) most = max(most, __shfl_xor_sync(all_lanes, most, step));
#pragma unroll 1
      for (int i = 0; i < most; ++i) {
        const Sample<T> sample = table[i];
        T part[4] = {};
        for (int channel = at.lane * Vec; channel < (wide ? channels : warp * Vec); channel += warp * Vec) {
          const bool mine = wide || channel < channels;
          if (wide) load<T, Stored>(incoming, grad_out + channel);
          const Stored* column = opaque(value + (mine ? channel : 0));
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            T corner[Vec];
            load<T, Stored>(corner, column + sample.offset[c]);
#pragma unroll
            for (int v = 0; v < Vec; ++v) part[c] += corner[v] * incoming[v];
          }
          if (!adds || !mine) continue;
          T* sums = grad_value + channel;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            T gradient[Vec];
#pragma unroll
            for (int v = 0; v < Vec; ++v) gradient[v] = sample.weight[c] * incoming[v];
            if (sample.weight[c] != T(0)) add<T>(sums + sample.offset[c], gradient);
          }
        }
        const T dot = sum_of_four<Group>(part, at.lane);
        if (at.lane % (Group / 4) == 0) dots[i][at.lane / (Group / 4)] = dot;
      }
      __syncwarp();
      T dot[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) dot[c] = own.corners.inside && own.corners.has(c) ? dots[own.slot][c] : T(0);
      const T right = own.corners.x.fraction, down = own.corners.y.fraction, weight = own.corners.attention;
      const T left_sum = (1 - down) * dot[0] + down * dot[2], right_sum = (1 - down) * dot[1] + down * dot[3];
      const T top_sum = (1 - right) * dot[0] + right * dot[1], bottom_sum = (1 - right) * dot[2] + right * dot[3];
      const T gradient = (1 - right) * left_sum + right * right_sum;
      if (own.any) mean += weight * gradient;
      if (own.any && at.live) {
        const int level = int(__umulhi(k + 1, a.per_level));
        const T x = attention.fused ? T(1) : T(a.width[level]), y = attention.fused ? T(1) : T(a.height[level]);
        grad_samples[k] = {weight * (right_sum - left_sum) * x, weight * (bottom_sum - top_sum) * y};
        grad_weights[k] = gradient;
        if (a.attention != nullptr) ((T*)a.attention)[index * count + k] = weight;
      }
    }
    if (attention.fused) {
      mean = group_sum<Group>(mean);
#pragma unroll 1
      for (int k = at.lane; at.live && k < count; k += Group) {
        grad_weights[k] = attention(pair.weights[k]) * (grad_weights[k] - mean);
      }
    }
  }
}

// The gradient of value in the order of the queries, whatever the card. A warp owns a tile of neighbouring rows of one level
// and 32 channels, one per lane; it goes through the samples of that level, 32 at a time, and adds those that touch its rows
// to its sums in shared memory. blockIdx is (tile and channels, head, frame); tiles of small levels are small, so that there
// are enough of them.
constexpr int ordered_warps = 4, most_tiles = 16, most_tile_bytes = 10240;  // 4 tiles and tables: below 48 KB
constexpr unsigned absent = 0xffffffffu;

template <class T, class Stored>
__global__ void __launch_bounds__(ordered_warps* warp, 4) ordered_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const Problem& p = a.p;
  const int lane = threadIdx.x % warp, own = threadIdx.x / warp, m = blockIdx.y, points = a.points;
  const int slabs = (a.channels + warp - 1) / warp, job = blockIdx.x * ordered_warps + own;
  const int tile = job / slabs, channel = job % slabs * warp + lane;
  if (tile >= a.first_tile[a.levels]) return;
  Sample<T>* table = reinterpret_cast<Sample<T>*>(shared_bytes) + own * warp;
  T* sums = reinterpret_cast<T*>(shared_bytes + ordered_warps * warp * sizeof(Sample<T>) + own * a.tile_bytes) + lane;
  int level = 0;
  while (tile >= a.first_tile[level + 1]) ++level;
  const int begin = a.start[level] + (tile - a.first_tile[level]) * a.tile_rows[level];
  const int rows = min(a.tile_rows[level], a.start[level] + a.height[level] * a.width[level] - begin);
  const int per_pass = points < warp ? warp / points : 1;  // queries
  const int own_query = points < warp ? lane / points : 0, own_point = points < warp ? lane % points : lane;
  for (int64_t n = blockIdx.z; n < a.batch; n += gridDim.z) {
    for (int row = 0; row < rows; ++row) sums[row * warp] = 0;
    const Stored* grad_out = (const Stored*)p.grad_out + n * p.grad_out_n + m * a.channels + channel;
    for (int first = 0; first < a.queries; first += per_pass) {
      for (int point = own_point; point - own_point < points; point += warp) {
        const int q = first + own_query;
        bool hit = own_query < per_pass && q < a.queries && point < points;
        if (hit) {
          const int k = level * points + point;
          const T attention = ((const T*)a.attention)[((n * a.queries + q) * a.heads + m) * a.count + k];
          const Corners<T> corner = corners<T>(a, Pair<T>(a, n, q, m), k, level, attention);
          Sample<T> sample = entry<false>(corner, 1);
          hit = false;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const unsigned row = sample.offset[c] - begin;
            const bool here = corner.inside && corner.has(c) && row < unsigned(rows);
            sample.offset[c] = here ? row * warp : absent;
            hit |= here;
          }
          if (hit) table[lane] = sample;
        }
        unsigned hits = __ballot_sync(all_lanes, hit);
        __syncwarp();
        for (; hits != 0; hits &= hits - 1) {
          const int source = __ffs(hits) - 1, query = first + __shfl_sync(all_lanes, own_query, source);
          const T incoming = channel < a.channels ? widen(grad_out[int64_t(query) * a.grad_out_q]) : T(0);
          const Sample<T> sample = table[source];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (sample.offset[c] != absent) sums[sample.offset[c]] += sample.weight[c] * incoming;
          }
        }
        __syncwarp();
      }
    }
    if (channel >= a.channels) continue;
    const int row_length = a.heads * a.channels;
    Stored* grad_value = (Stored*)p.grad_value + (n * p.rows + begin) * row_length + m * a.channels + channel;
    for (int row = 0; row < rows; ++row) grad_value[int64_t(row) * row_length] = narrow<Stored>(sums[row * warp]);
  }
}

template <class T>
Arguments arguments_of(const Problem& p) {
  Arguments a{};
  a.p = p;
  a.p.shapes = nullptr;  // host memory
  a.batch = int(p.batch), a.queries = int(p.queries), a.heads = int(p.heads), a.channels = int(p.channels);
  a.levels = int(p.levels), a.points = int(p.points), a.count = a.levels * a.points;
  a.value_l = int(p.value_l), a.samples_q = int(p.samples_q), a.weights_q = int(p.weights_q);
  a.reference_q = int(p.reference_q), a.reference_l = int(p.reference_l), a.grad_out_q = int(p.grad_out_q);
  a.per_level = 0xffffffffu / unsigned(p.points);
  constexpr int most_rows = most_tile_bytes / int(warp * sizeof(T));
  int start = 0;
  for (int level = 0; level < p.levels; ++level) {
    a.height[level] = int(p.shapes[2 * level]), a.width[level] = int(p.shapes[2 * level + 1]);
    a.start[level] = start;
    const int area = a.height[level] * a.width[level], rows = std::min((area + most_tiles - 1) / most_tiles, most_rows);
    a.tile_rows[level] = rows;
    a.tile_bytes = std::max(a.tile_bytes, int(rows * warp * sizeof(T)));
    a.first_tile[level + 1] = a.first_tile[level] + (area + rows - 1) / rows;
    start += area;
  }
  return a;
}

// Whether channels, strides and addresses allow packs of 16 bytes.
template <class Stored>
bool packs(const Problem& p, bool backward) {
  constexpr int vec = int(16 / sizeof(Stored));
  const auto fits = [&](const void* pointer, int64_t a, int64_t b, int64_t c) {
    return uintptr_t(pointer) % 16 == 0 && a % vec == 0 && b % vec == 0 && c % vec == 0;
  };
  return p.channels % vec == 0 && fits(p.value, p.value_n, p.value_l, p.value_m) &&
         (backward ? fits(p.grad_out, p.grad_out_n, p.grad_out_q, 0) : fits(p.out, 0, 0, 0));
}

template <class T, class Stored, int Vec, int Group>
void launch(const Arguments& a, bool backward, cudaStream_t stream) {
  constexpr int queries = block_threads / Group;
  const dim3 grid(unsigned((a.p.queries + queries - 1) / queries), a.heads, std::min(a.batch, most_heads));
  constexpr size_t table = block_threads * sizeof(Sample<T>), dots = block_threads * 4 * sizeof(T);
  if (backward) {
    backward_kernel<T, Stored, Vec, Group><<<grid, block_threads, table + dots, stream>>>(a);
  } else {
    forward_kernel<T, Stored, Vec, Group><<<grid, block_threads, table, stream>>>(a);
  }
}

// The smallest group that takes all channels at once, at most a warp.
template <class T, class Stored>
void launch_any(const Arguments& a, bool backward, cudaStream_t stream) {
  constexpr int vec = int(16 / sizeof(Stored));
  if (!packs<Stored>(a.p, backward)) return launch<T, Stored, 1, 32>(a, backward, stream);
  if (a.channels <= 4 * vec) return launch<T, Stored, vec, 4>(a, backward, stream);
  if (a.channels <= 8 * vec) return launch<T, Stored, vec, 8>(a, backward, stream);
  if (a.channels <= 16 * vec) return launch<T, Stored, vec, 16>(a, backward, stream);
  launch<T, Stored, vec, 32>(a, backward, stream);
}

template <class T, class Stored>
cudaError_t run(const Problem& p, bool backward, void* sum, void* attention, cudaStream_t stream) {
  Arguments a = arguments_of<T>(p);
  a.grad_value_sum = sum, a.attention = attention;
  launch_any<T, Stored>(a, backward, stream);
  if (backward && sum == nullptr) {
    const int jobs = a.first_tile[a.levels] * ((a.channels + warp - 1) / warp);
    const dim3 grid((jobs + ordered_warps - 1) / ordered_warps, a.heads, std::min(a.batch, most_heads));
    const size_t bytes = ordered_warps * (warp * sizeof(Sample<T>) + a.tile_bytes);
    ordered_kernel<T, Stored><<<grid, ordered_warps * warp, bytes, stream>>>(a);
  }
  return cudaGetLastError();
}

cudaError_t run_any(const Problem& p, Storage storage, bool backward, void* sum, void* attention, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (storage) {
    case Storage::f64:
      return run<double, double>(p, backward, sum, attention, stream);
    case Storage::bf16:
      return run<float, __nv_bfloat16>(p, backward, sum, attention, stream);
    case Storage::f16:
      return run<float, __half>(p, backward, sum, attention, stream);
    default:
      return run<float, float>(p, backward, sum, attention, stream);
  }
}

}  // namespace

int cuda_forward(const Problem& p, Storage storage, void* stream) {
  return run_any(p, storage, false, nullptr, nullptr, stream);
}

int cuda_backward(const Problem& p, Storage storage, void* grad_value_sum, void* attention, void* stream) {
  return run_any(p, storage, true, grad_value_sum, attention, stream);
}

}  // namespace modat
