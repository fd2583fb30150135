// Backward pass over (n, m) slices. Slices of `value` and of its gradient are packed into contiguous scratch memory.
// Each slice has one owner, so there are no atomics and results do not depend on the number of threads. Unpacked rows,
// M * D apart in memory, would share a few sets of the L1 cache.

template <class T, int W>
MODAT_INLINE int64_t padded_channels(const Problem& p) {
  return (p.channels + W - 1) / W * W;
}

// One query of a slice: adds to the rows of grad_value and stores the corner products <value corner, grad_out> in s.dot.
template <class T, int W, int NV, class Table>
MODAT_INLINE void scatter(const T* value, T* grad_value, const T* grad_out, const Table& s, int64_t at, int64_t vectors) {
  using S = Simd<T, W>;
  using V = typename S::V;
  constexpr int group = W / 4;  // samples whose 4 products fill a vector
  const int64_t nv = NV ? NV : vectors;
  V grad[NV ? NV : 1];
  for (int j = 0; j < NV; ++j) grad[j] = S::load(grad_out + j * W);
  for (int64_t first = 0; first < s.count; first += group) {
    V product[W];
#pragma GCC unroll 4
    for (int i = 0; i < group; ++i) {
      const int64_t k = first + i;
      if (k >= s.count) {
        for (int c = 0; c < 4; ++c) product[c * group + i] = V{};
        continue;
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const T weight = s.weight[c][at + k];
        const T* corner = value + s.offset[c][at + k];
        T* grad_corner = grad_value + s.offset[c][at + k];
        V dot{};
        if constexpr (NV > 0) {
#pragma GCC unroll 16
          for (int j = 0; j < NV; ++j) {
            dot += grad[j] * S::load(corner + j * W);
            S::store(grad_corner + j * W, S::load(grad_corner + j * W) + weight * grad[j]);
          }
        } else {
          for (int64_t j = 0; j < nv; ++j) {
            const V g = S::load(grad_out + j * W);
            dot += g * S::load(corner + j * W);
            S::store(grad_corner + j * W, S::load(grad_corner + j * W) + weight * g);
          }
        }
        product[c * group + i] = dot;
      }
    }
    const V sums = S::sums(product);
    for (int c = 0; c < 4; ++c) __builtin_memcpy(s.dot[c] + at + first, (const T*)&sums + c * group, group * sizeof(T));
  }
}

// From corner products to the gradients of locations and weights (or offsets and logits).
template <class T, int W, class Table>
MODAT_INLINE void finish(const Table& s, int64_t at, T* grad_points, T* grad_weights) {
  using S = Simd<T, W>;
  using V = typename S::V;
  V mean{};
  for (int64_t k = 0; k < Table::extent(s); k += W) {
    const V far_x = S::load(s.right + at + k), far_y = S::load(s.down + at + k);
    const V near_x = (T)1 - far_x, near_y = (T)1 - far_y;
    const V dot0 = S::load(s.dot[0] + at + k), dot1 = S::load(s.dot[1] + at + k);
    const V dot2 = S::load(s.dot[2] + at + k), dot3 = S::load(s.dot[3] + at + k);
    const V attention = S::load(s.attention + at + k);
    const V left = near_y * dot0 + far_y * dot2, right = near_y * dot1 + far_y * dot3;
    const V top = near_x * dot0 + far_x * dot1, bottom = near_x * dot2 + far_x * dot3;
    V x = attention * (right - left), y = attention * (bottom - top);
    if (!s.fused) {
      x *= S::load(s.level_width + k);
      y *= S::load(s.level_height + k);
    }
    V a, b;
    S::join_pairs(x, y, a, b);
    const int64_t left_over = 2 * (s.count - k);
    S::store_n(grad_points + 2 * k, a, left_over);
    S::store_n(grad_points + 2 * k + W, b, left_over - W);
    const V weight = near_x * left + far_x * right;
    if (s.fused) {
      mean += attention * weight;
      S::store(s.weight[0] + at + k, weight);  // the corner weights are no longer needed
    } else {
      S::store_n(grad_weights + k, weight, s.count - k);
    }
  }
  if (!s.fused) return;
  mean = S::total(mean);
  for (int64_t k = 0; k < Table::extent(s); k += W) {
    S::store_n(grad_weights + k, S::load(s.attention + at + k) * (S::load(s.weight[0] + at + k) - mean), s.count - k);
  }
}

template <class T, int W, class Stored>
void pack(const Problem& p, int64_t n, int64_t m, T* value, T* grad_value) {
  using S = Simd<T, W>;
  const Stored* from = (const Stored*)p.value + n * p.value_n + m * p.value_m;
  for (int64_t l = 0; l < p.rows; ++l, from += p.value_l) {
    prefetch_row(from + ahead * p.value_l, p.channels);
    for (int64_t d = 0; d < p.channels; d += W, value += W, grad_value += W) {
      S::store(value, S::load_n(from + d, p.channels - d));
      S::store(grad_value, typename S::V{});
    }
  }
}

template <class T, int W, class Stored>
void unpack(const Problem& p, int64_t n, int64_t m, const T* grad_value) {
  using S = Simd<T, W>;
  Stored* to = (Stored*)p.grad_value + (n * p.rows * p.heads + m) * p.channels;
  for (int64_t l = 0; l < p.rows; ++l, to += p.heads * p.channels) {
    for (int64_t d = 0; d < p.channels; d += W, grad_value += W) {
      S::store_n(to + d, S::load(grad_value), p.channels - d);
    }
  }
}

template <class T, int W, int Vectors, int Channels, class Stored>
void backward_slices(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  using S = Simd<T, W>;
  using Table = Samples<T, W, Vectors>;
  const int64_t stride = padded_channels<T, W>(p), absent = p.rows * stride;
  T* value = (T*)scratch;
  T* grad_value = value + absent + stride;
  T* grad_out = grad_value + absent + stride;
  Table s(p, grad_out + stride, stride, absent, together);
  for (int64_t d = 0; d < stride; ++d) value[absent + d] = grad_value[absent + d] = 0;
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t n = slice / p.heads, m = slice % p.heads;
    pack<T, W, Stored>(p, n, m, value, grad_value);
    const T* weights = (const T*)p.weights + n * p.weights_n + m * s.count;
    const T* points = (const T*)p.samples + n * p.samples_n + 2 * m * s.count;
    const T* reference = (const T*)p.reference + n * p.reference_n;
    const Stored* incoming = (const Stored*)p.grad_out + n * p.grad_out_n + m * p.channels;
    for (int64_t first = 0; first < p.queries; first += together) {
      const int64_t last = first + together < p.queries ? first + together : p.queries;
      for (int64_t q = first + ahead; q < last + ahead; ++q) {
        Table::prefetch(s, weights + q * p.weights_q, points + q * p.samples_q);
        prefetch_row(incoming + q * p.grad_out_q, p.channels);
      }
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) Table::set_attention(s, weights + q * p.weights_q, at);
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        Table::template set_corners<true>(s, p, points + q * p.samples_q, reference + q * p.reference_q, at);
      }
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        const Stored* row = incoming + q * p.grad_out_q;
        for (int64_t d = 0; d < p.channels; d += W) S::store(grad_out + d, S::load_n(row + d, p.channels - d));
        scatter<T, W, Channels / W>(value, grad_value, grad_out, s, at, stride / W);
      }
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        const int64_t head = ((n * p.queries + q) * p.heads + m) * s.count;
        finish<T, W>(s, at, (T*)p.grad_samples + 2 * head, (T*)p.grad_weights + head);
      }
    }
    unpack<T, W, Stored>(p, n, m, grad_value);
  }
}

template <class T, int W, class Stored>
void backward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if constexpr (sizeof(T) == 4) {
    constexpr int few = 16 / W;
    if (p.levels * p.points <= 16) {
      if (p.channels == 32) return backward_slices<T, W, few, 32, Stored>(p, begin, end, scratch);
      if (p.channels == 64) return backward_slices<T, W, few, 64, Stored>(p, begin, end, scratch);
    }
  }
  backward_slices<T, W, 0, 0, Stored>(p, begin, end, scratch);
}

template <class T, int W>
int64_t backward_scratch(const Problem& p) {
  const int64_t tables = Samples<T, W, 16 / W>::bytes(p, together), any = Samples<T, W, 0>::bytes(p, together);
  return (2 * p.rows + 3) * padded_channels<T, W>(p) * (int64_t)sizeof(T) + (tables > any ? tables : any);
}
