// The classic CUDA algorithm of deformable attention, as a baseline for scripts/benchmark/ops.py: forward with one thread
// for each output channel, every thread working out its coordinates anew; backward with one block for each head of each
// query, scalar atomic additions, and thread 0 summing the block's partial results. float32, contiguous tensors.
#include <cuda_runtime.h>

#include <stdint.h>

namespace {

struct Sizes {
  int batch, rows, heads, channels, queries, levels, points;
  const int64_t* shapes;  // (levels, 2) on the device
  const int64_t* starts;  // (levels,) on the device
};

__device__ float corner(const float* level, int y, int x, int height, int width, int pitch) {
  return y >= 0 && x >= 0 && y < height && x < width ? level[(int64_t(y) * width + x) * pitch] : 0.0f;
}

__global__ void forward_kernel(Sizes s, const float* value, const float* locations, const float* weights, float* out) {
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= int64_t(s.batch) * s.queries * s.heads * s.channels) return;
  const int channel = index % s.channels, m = index / s.channels % s.heads, pitch = s.heads * s.channels;
  const int64_t pair = index / s.channels, n = pair / s.heads / s.queries;
  int64_t k = pair * s.levels * s.points;
  float sum = 0;
  for (int l = 0; l < s.levels; ++l) {
    const int height = s.shapes[2 * l], width = s.shapes[2 * l + 1];
    const float* level = value + (n * s.rows + s.starts[l]) * pitch + m * s.channels + channel;
    for (int p = 0; p < s.points; ++p, ++k) {
      const float x = locations[2 * k] * width - 0.5f, y = locations[2 * k + 1] * height - 0.5f;
      if (!(x > -1 && y > -1 && x < width && y < height)) continue;
      const int left = floorf(x), top = floorf(y);
      const float fx = x - left, fy = y - top;
      sum += weights[k] * ((1 - fy) * ((1 - fx) * corner(level, top, left, height, width, pitch) +
                                       fx * corner(level, top, left + 1, height, width, pitch)) +
                           fy * ((1 - fx) * corner(level, top + 1, left, height, width, pitch) +
                                 fx * corner(level, top + 1, left + 1, height, width, pitch)));
    }
  }
  out[index] = sum;
}

// blockDim.x = channels; shared memory: 3 * channels floats.
__global__ void backward_kernel(Sizes s, const float* value, const float* locations, const float* weights,
                                const float* grad_out, float* grad_value, float* grad_locations, float* grad_weights) {
  extern __shared__ float partial[];
  const int channel = threadIdx.x, pitch = s.heads * s.channels;
  const int64_t pair = blockIdx.x, n = pair / s.heads / s.queries;
  const int m = pair % s.heads;
  const float grad = grad_out[pair * s.channels + channel];
  int64_t k = pair * s.levels * s.points;
  for (int l = 0; l < s.levels; ++l) {
    const int height = s.shapes[2 * l], width = s.shapes[2 * l + 1];
    const int64_t base = (n * s.rows + s.starts[l]) * pitch + m * s.channels + channel;
    for (int p = 0; p < s.points; ++p, ++k) {
      const float x = locations[2 * k] * width - 0.5f, y = locations[2 * k + 1] * height - 0.5f;
      float to_weight = 0, to_x = 0, to_y = 0;
      if (x > -1 && y > -1 && x < width && y < height) {
        const int left = floorf(x), top = floorf(y);
        const float fx = x - left, fy = y - top;
        float at[2][2];
        for (int j = 0; j < 2; ++j) {
          for (int i = 0; i < 2; ++i) {
            at[j][i] = corner(value + base, top + j, left + i, height, width, pitch);
            const bool inside = top + j >= 0 && left + i >= 0 && top + j < height && left + i < width;
            const float part = (j ? fy : 1 - fy) * (i ? fx : 1 - fx);
            if (inside) {
              atomicAdd(grad_value + base + (int64_t(top + j) * width + left + i) * pitch, weights[k] * part * grad);
            }
            to_weight += part * at[j][i] * grad;
          }
        }
        to_x = weights[k] * grad * width * ((1 - fy) * (at[0][1] - at[0][0]) + fy * (at[1][1] - at[1][0]));
        to_y = weights[k] * grad * height * ((1 - fx) * (at[1][0] - at[0][0]) + fx * (at[1][1] - at[0][1]));
      }
      partial[3 * channel] = to_weight, partial[3 * channel + 1] = to_x, partial[3 * channel + 2] = to_y;
      __syncthreads();
      if (channel == 0) {
        for (int other = 1; other < s.channels; ++other) {
          to_weight += partial[3 * other], to_x += partial[3 * other + 1], to_y += partial[3 * other + 2];
        }
        grad_weights[k] = to_weight, grad_locations[2 * k] = to_x, grad_locations[2 * k + 1] = to_y;
      }
      __syncthreads();
    }
  }
}

}  // namespace

extern "C" int classic_forward(const int* sizes, const void* shapes, const void* starts, const float* value,
                               const float* locations, const float* weights, float* out, void* stream) {
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], (const int64_t*)shapes, (const int64_t*)starts};
  const int64_t threads = int64_t(s.batch) * s.queries * s.heads * s.channels;
  forward_kernel<<<unsigned((threads + 1023) / 1024), 1024, 0, (cudaStream_t)stream>>>(s, value, locations, weights, out);
  return cudaGetLastError();
}

extern "C" int classic_backward(const int* sizes, const void* shapes, const void* starts, const float* value,
                                const float* locations, const float* weights, const float* grad_out, float* grad_value,
                                float* grad_locations, float* grad_weights, void* stream) {
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], (const int64_t*)shapes, (const int64_t*)starts};
  const unsigned pairs = unsigned(int64_t(s.batch) * s.queries * s.heads);
  backward_kernel<<<pairs, s.channels, 3 * s.channels * sizeof(float), (cudaStream_t)stream>>>(
      s, value, locations, weights, grad_out, grad_value, grad_locations, grad_weights);
  return cudaGetLastError();
}
