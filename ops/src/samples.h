// The address step: from locations and weights (or reference points, offsets and logits) of one head of one query to
// corner addresses and corner weights. Corners outside a level keep an address inside it and get weight 0, so that the
// loops over corners have no branches.

template <class T, int W>
struct Samples {
  using S = Simd<T, W>;
  using V = typename S::V;
  using I = typename S::I;
  using Int = typename S::Int;

  int64_t count, padded;  // levels * points, and that rounded up to W
  // A level's numbers, repeated for its points.
  T *level_width, *level_height;
  Int *start, *row;  // offsets of the level and of one row of it
  T *reference_x, *reference_y;
  // Of one head of one query.
  T* attention;
  Int* offset[4];  // corners: top left, top right, bottom left, bottom right
  T* weight[4];    // attention weight included
  // For the backward pass: weights and presence (1 or 0) of the near and far corner along each axis; corner products.
  T *x_near, *x_far, *y_near, *y_far, *has_left, *has_right, *has_top, *has_bottom;
  T* dot[4];

  static constexpr int arrays = 27;
  static int64_t padded_count(const Problem& p) { return (p.levels * p.points + W - 1) / W * W; }
  static int64_t bytes(const Problem& p) { return arrays * padded_count(p) * (int64_t)sizeof(T) + 64; }

  // Carves the arrays out of `memory` and fills in the levels; `stride` is that of value rows, in elements.
  Samples(const Problem& p, void* memory, int64_t stride) : count(p.levels * p.points), padded(padded_count(p)) {
    T* next = (T*)memory;
    auto take = [&]() {
      T* array = next;
      next += padded;
      return array;
    };
    level_width = take(), level_height = take(), start = (Int*)take(), row = (Int*)take();
    reference_x = take(), reference_y = take(), attention = take();
    for (int c = 0; c < 4; ++c) offset[c] = (Int*)take(), weight[c] = take(), dot[c] = take();
    x_near = take(), x_far = take(), y_near = take(), y_far = take();
    has_left = take(), has_right = take(), has_top = take(), has_bottom = take();

    for (int64_t k = 0; k < padded; ++k) {
      level_width[k] = level_height[k] = 1, start[k] = row[k] = 0;
      for (int c = 0; c < 4; ++c) dot[c][k] = 0;
    }
    int64_t first = 0;
    for (int64_t level = 0; level < p.levels; ++level) {
      const int64_t height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
      for (int64_t k = level * p.points; k < (level + 1) * p.points; ++k) {
        level_width[k] = (T)width, level_height[k] = (T)height;
        start[k] = (Int)(first * stride), row[k] = (Int)(width * stride);
      }
      first += height * width;
    }
    row_stride = (Int)stride;
  }

  // Once a query, where fused: reference points in pixels.
  MODAT_INLINE void set_reference(Samples& s, const Problem& p, int64_t n, int64_t q) {
    const T* reference = (const T*)p.reference + n * p.reference_n + q * p.reference_q;
    if (p.reference_l == 0) {
      const T x = reference[0], y = reference[1];
      for (int64_t k = 0; k < s.padded; k += W) {
        S::store(s.reference_x + k, x * S::load(s.level_width + k) - (T)0.5);
        S::store(s.reference_y + k, y * S::load(s.level_height + k) - (T)0.5);
      }
      return;
    }
    for (int64_t k = s.count; k < s.padded; ++k) s.reference_x[k] = s.reference_y[k] = 0;
    for (int64_t k = 0; k < s.count; ++k) {
      const T* point = reference + k / p.points * p.reference_l;
      s.reference_x[k] = point[0] * s.level_width[k] - (T)0.5;
      s.reference_y[k] = point[1] * s.level_height[k] - (T)0.5;
    }
  }

  // Fills `attention`; past `count` with zeros.
  MODAT_INLINE void set_attention(Samples& s, const T* weights, bool fused) {
    if (!fused) {
      for (int64_t k = 0; k < s.padded; k += W) S::store(s.attention + k, S::load_n(weights + k, s.count - k));
      return;
    }
    const V lowest = S::set((T)-__builtin_inf());
    V high = lowest;
    for (int64_t k = 0; k < s.padded; k += W) high = S::at_least(high, logits(s, weights, k, lowest));
    high = S::maximum(high);
    V sum{};
    for (int64_t k = 0; k < s.padded; k += W) {
      const V e = S::exp_nonpositive(logits(s, weights, k, lowest) - high);
      S::store(s.attention + k, e);
      sum += e;
    }
    const V scale = (T)1 / S::total(sum);
    for (int64_t k = 0; k < s.padded; k += W) S::store(s.attention + k, S::load(s.attention + k) * scale);
  }

  // Fills offsets and weights, and what the backward pass needs.
  template <bool Backward>
  MODAT_INLINE void set_corners(Samples& s, const T* points, bool fused) {
    for (int64_t k = 0; k < s.padded; k += W) {
      const int64_t left = 2 * (s.count - k);
      V x, y;
      S::split_pairs(S::load_n(points + 2 * k, left), S::load_n(points + 2 * k + W, left - W), x, y);
      const V width = S::load(s.level_width + k), height = S::load(s.level_height + k);
      if (fused) {
        x += S::load(s.reference_x + k);
        y += S::load(s.reference_y + k);
      } else {
        x = x * width - (T)0.5;
        y = y * height - (T)0.5;
      }
      const Axis horizontal = axis(x, width), vertical = axis(y, height);
      const V attention = S::load(s.attention + k);
      const V top = attention * vertical.near, bottom = attention * vertical.far;
      S::store(s.weight[0] + k, top * horizontal.near);
      S::store(s.weight[1] + k, top * horizontal.far);
      S::store(s.weight[2] + k, bottom * horizontal.near);
      S::store(s.weight[3] + k, bottom * horizontal.far);
      const I first = S::load_int(s.start + k), row = S::load_int(s.row + k);
      const I above = first + vertical.first * row, below = first + vertical.second * row;
      const I left_column = horizontal.first * s.row_stride, right_column = horizontal.second * s.row_stride;
      S::store_int(s.offset[0] + k, above + left_column);
      S::store_int(s.offset[1] + k, above + right_column);
      S::store_int(s.offset[2] + k, below + left_column);
      S::store_int(s.offset[3] + k, below + right_column);
      if constexpr (Backward) {
        S::store(s.x_near + k, horizontal.near), S::store(s.x_far + k, horizontal.far);
        S::store(s.y_near + k, vertical.near), S::store(s.y_far + k, vertical.far);
        S::store(s.has_left + k, horizontal.has_first), S::store(s.has_right + k, horizontal.has_second);
        S::store(s.has_top + k, vertical.has_first), S::store(s.has_bottom + k, vertical.has_second);
      }
    }
  }

 private:
  Int row_stride;

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
