// The address step: from locations and weights (or reference points, offsets and logits) of one head of one query to
// corner addresses and corner weights. Corners outside a level keep an address inside it and get weight 0, so that the
// loops over corners have no branches. There are tables for several (head, query) pairs at once: each is a long chain
// of dependent steps, and the processor overlaps those of neighbours.

constexpr int64_t line = 64;  // bytes of a cache line

template <class T, int W>
struct Samples {
  using S = Simd<T, W>;
  using V = typename S::V;
  using I = typename S::I;
  using Int = typename S::Int;

  int64_t count, padded;  // levels * points, and that rounded up to W: the tables' pitch
  // A level's numbers, repeated for its points.
  T *level_width, *level_height;
  Int *level, *start, *row;  // number of the level, offsets of it and of one row of it
  T *reference_x, *reference_y;
  // Of each (head, query) pair; functions take the pair's place `at` in the tables, a multiple of `padded`.
  T* attention;
  Int* offset[4];  // corners: top left, top right, bottom left, bottom right
  T* weight[4];    // attention weight included
  // For the backward pass: weights and presence (1 or 0) of the near and far corner along each axis; corner products.
  T *x_near, *x_far, *y_near, *y_far, *has_left, *has_right, *has_top, *has_bottom;
  T* dot[4];
  Int row_stride;

  static constexpr int shared_arrays = 5, pair_arrays = 23;
  static int64_t padded_count(const Problem& p) { return (p.levels * p.points + W - 1) / W * W; }
  static int64_t bytes(const Problem& p, int64_t pairs) {
    return (shared_arrays + pair_arrays * pairs) * padded_count(p) * (int64_t)sizeof(T);
  }

  // Carves the arrays out of `memory` and fills in the levels; `stride` is that of value rows, in elements.
  Samples(const Problem& p, void* memory, int64_t stride, int64_t pairs)
      : count(p.levels * p.points), padded(padded_count(p)), row_stride((Int)stride) {
    T* next = (T*)memory;
    int64_t length = padded;
    auto take = [&]() {
      T* array = next;
      next += length;
      return array;
    };
    level_width = take(), level_height = take();
    level = (Int*)take(), start = (Int*)take(), row = (Int*)take();
    length = padded * pairs;
    reference_x = take(), reference_y = take(), attention = take();
    for (int c = 0; c < 4; ++c) offset[c] = (Int*)take(), weight[c] = take(), dot[c] = take();
    x_near = take(), x_far = take(), y_near = take(), y_far = take();
    has_left = take(), has_right = take(), has_top = take(), has_bottom = take();

    for (int64_t k = 0; k < padded; ++k) {
      level_width[k] = level_height[k] = 1, level[k] = start[k] = row[k] = 0;
    }
    for (int c = 0; c < 4; ++c) {
      for (int64_t k = 0; k < length; ++k) dot[c][k] = 0;  // what lies past `count` is never written, but read
    }
    int64_t first = 0;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
      for (int64_t k = l * p.points; k < (l + 1) * p.points; ++k) {
        level[k] = (Int)l;
        level_width[k] = (T)width, level_height[k] = (T)height;
        start[k] = (Int)(first * stride), row[k] = (Int)(width * stride);
      }
      first += height * width;
    }
  }

  // Of one head's queries to come: heads lie next to each other in memory, its queries too far apart for the processor
  // to see the pattern. May reach past the end; nothing is read.
  MODAT_INLINE void prefetch(const Problem& p, const T* points, const T* weights, int64_t begin, int64_t end) {
    const int64_t count = p.levels * p.points, step = line / (int64_t)sizeof(T);
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t k = 0; k < count; k += step) __builtin_prefetch(weights + q * p.weights_q + k);
      for (int64_t k = 0; k < 2 * count; k += step) __builtin_prefetch(points + q * p.samples_q + k);
    }
  }

  // Once a query, where fused: reference points in pixels.
  MODAT_INLINE void set_reference(const Samples& s, const Problem& p, int64_t n, int64_t q, int64_t at) {
    const T* reference = (const T*)p.reference + n * p.reference_n + q * p.reference_q;
    const int64_t levels = p.reference_l == 0 ? 1 : p.levels;
    for (int64_t k = 0; k < s.padded; k += W) {
      const I level_of = S::load_int(s.level + k);
      V x = S::set(reference[0]), y = S::set(reference[1]);
      for (int64_t level = 1; level < levels; ++level) {
        const T* point = reference + level * p.reference_l;
        const I here = level_of == (Int)level;
        x = here ? S::set(point[0]) : x;
        y = here ? S::set(point[1]) : y;
      }
      S::store(s.reference_x + at + k, x * S::load(s.level_width + k) - (T)0.5);
      S::store(s.reference_y + at + k, y * S::load(s.level_height + k) - (T)0.5);
    }
  }

  // Fills `attention`; past `count` with zeros.
  MODAT_INLINE void set_attention(const Samples& s, const T* weights, bool fused, int64_t at) {
    T* attention = s.attention + at;
    if (!fused) {
      for (int64_t k = 0; k < s.padded; k += W) S::store(attention + k, S::load_n(weights + k, s.count - k));
      return;
    }
    const V lowest = S::set((T)-__builtin_inf());
    V high = lowest;
    for (int64_t k = 0; k < s.padded; k += W) high = S::at_least(high, logits(s, weights, k, lowest));
    high = S::maximum(high);
    V sum{};
    for (int64_t k = 0; k < s.padded; k += W) {
      const V e = S::exp_nonpositive(logits(s, weights, k, lowest) - high);
      S::store(attention + k, e);
      sum += e;
    }
    const T scale = (T)1 / S::total(sum)[0];
    for (int64_t k = 0; k < s.padded; k += W) S::store(attention + k, S::load(attention + k) * scale);
  }

  // Fills offsets and weights, and what the backward pass needs.
  template <bool Backward>
  MODAT_INLINE void set_corners(const Samples& s, const T* points, bool fused, int64_t at, int64_t reference_at) {
    for (int64_t k = 0; k < s.padded; k += W) {
      const int64_t left = 2 * (s.count - k);
      V x, y;
      S::split_pairs(S::load_n(points + 2 * k, left), S::load_n(points + 2 * k + W, left - W), x, y);
      const V width = S::load(s.level_width + k), height = S::load(s.level_height + k);
      if (fused) {
        x += S::load(s.reference_x + reference_at + k);
        y += S::load(s.reference_y + reference_at + k);
      } else {
        x = x * width - (T)0.5;
        y = y * height - (T)0.5;
      }
      const Axis horizontal = axis(x, width), vertical = axis(y, height);
      const V attention = S::load(s.attention + at + k);
      const V top = attention * vertical.near, bottom = attention * vertical.far;
      S::store(s.weight[0] + at + k, top * horizontal.near);
      S::store(s.weight[1] + at + k, top * horizontal.far);
      S::store(s.weight[2] + at + k, bottom * horizontal.near);
      S::store(s.weight[3] + at + k, bottom * horizontal.far);
      const I first = S::load_int(s.start + k), row = S::load_int(s.row + k);
      const I above = first + vertical.first * row, below = first + vertical.second * row;
      const I left_column = horizontal.first * s.row_stride, right_column = horizontal.second * s.row_stride;
      S::store_int(s.offset[0] + at + k, above + left_column);
      S::store_int(s.offset[1] + at + k, above + right_column);
      S::store_int(s.offset[2] + at + k, below + left_column);
      S::store_int(s.offset[3] + at + k, below + right_column);
      if constexpr (Backward) {
        S::store(s.x_near + at + k, horizontal.near), S::store(s.x_far + at + k, horizontal.far);
        S::store(s.y_near + at + k, vertical.near), S::store(s.y_far + at + k, vertical.far);
        S::store(s.has_left + at + k, horizontal.has_first), S::store(s.has_right + at + k, horizontal.has_second);
        S::store(s.has_top + at + k, vertical.has_first), S::store(s.has_bottom + at + k, vertical.has_second);
      }
    }
  }

 private:
  struct Axis {
    V near, far, has_first, has_second;
    I first, second;
  };

  // The two neighbours of pixel coordinate x on an axis of `size` pixels.
  MODAT_INLINE Axis axis(V x, V size) {
    const V last = size - (T)1;
    x = S::at_most(S::at_least(x, S::set(-2)), size + (T)1);  // keeps far away (and NaN) within the integers
    V floor = S::to_float(S::to_int(x));
    floor = floor > x ? floor - (T)1 : floor;
    const V fraction = x - floor;
    Axis a;
    a.has_first = S::one_where((floor >= S::set(0)) & (floor <= last));
    a.has_second = S::one_where((floor >= S::set(-1)) & (floor < last));
    a.near = a.has_first * ((T)1 - fraction);
    a.far = a.has_second * fraction;
    a.first = S::to_int(S::at_most(S::at_least(floor, V{}), last));
    a.second = S::to_int(S::at_most(S::at_least(floor + (T)1, V{}), last));
    return a;
  }

  MODAT_INLINE V logits(const Samples& s, const T* weights, int64_t k, V lowest) {
    const V v = S::load_n(weights + k, s.count - k);
    return S::lane() < (Int)(s.count - k) ? v : lowest;
  }
};
