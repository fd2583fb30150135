// The address step: from locations and weights (or reference points, offsets and logits) of one head of one query to
// corner addresses and corner weights. A corner outside its level gets the address `absent`, a row of zeros in the
// backward pass, or is in a border of zeros around the level: the loops over corners have no branches, and data next to a
// level cannot leak in. Tables of several (head, query) pairs are computed together: each is a long chain of dependent
// steps, which the processor overlaps.

constexpr int64_t line = 64;   // bytes of a cache line
constexpr int64_t ahead = 16;  // queries, or rows, to fetch before their turn
constexpr int64_t together = 4;  // queries whose tables are made at once
constexpr int64_t border = 2;  // pixels of zeros around a level: as many as a clamped sample touches

// The rows of a head are too far apart for the hardware prefetcher. May be past the end: nothing is read.
template <class Stored>
MODAT_INLINE void prefetch_row(const Stored* row, int64_t numbers) {
  for (int64_t d = 0; d < numbers; d += line / (int64_t)sizeof(Stored)) __builtin_prefetch(row + d);
}

// `Vectors`: of W samples, if that many hold all samples of a pair; 0 if known at run time only.
template <class T, int W, int Vectors>
struct Samples {
  using S = Simd<T, W>;
  using V = typename S::V;
  using I = typename S::I;
  using U = typename S::U;
  using Int = typename S::Int;
  using Uint = typename S::Uint;
  static constexpr Uint far = (Uint)1 << (8 * sizeof(T) - 2);  // above every address; twice as much still fits

  int64_t count, padded;  // levels * points, and rounded up to whole vectors: the pitch of the tables
  Uint absent, stride;
  bool fused;
  // A level's numbers, repeated for its points.
  T *level_width, *level_height;
  Uint *start, *row;  // offset of the level and of one of its rows, in numbers
  Int* level;
  // Per (head, query) pair; functions take the offset `at` of the pair in the tables, a multiple of `padded`.
  T* attention;
  Uint* offset[4];  // corners: top left, top right, bottom left, bottom right
  T* weight[4];     // attention weight included
  // For the backward pass: fractional offset from the first corner, and corner products.
  T *right, *down, *dot[4];

  static constexpr int shared_arrays = 5, pair_arrays = 15;
  static int64_t padded_count(const Problem& p) {
    return Vectors ? Vectors * W : (p.levels * p.points + W - 1) / W * W;
  }
  static int64_t bytes(const Problem& p, int64_t pairs) {
    return (shared_arrays + pair_arrays * pairs) * padded_count(p) * (int64_t)sizeof(T);
  }

  // Allocates the arrays in `memory` and fills in the levels; `row_stride` is that of value rows, in numbers, and
  // `zeros` the border that they are packed with.
  Samples(const Problem& p, void* memory, int64_t row_stride, int64_t absent_at, int64_t pairs, int64_t zeros = 0)
      : count(p.levels * p.points),
        padded(padded_count(p)),
        absent((Uint)absent_at),
        stride((Uint)row_stride),
        fused(p.reference != nullptr) {
    T* next = (T*)memory;
    int64_t length = padded;
    auto take = [&]() {
      T* array = next;
      next += length;
      return array;
    };
    level_width = take(), level_height = take();
    start = (Uint*)take(), row = (Uint*)take(), level = (Int*)take();
    length = padded * pairs;
    attention = take(), right = take(), down = take();
    for (int c = 0; c < 4; ++c) offset[c] = (Uint*)take(), weight[c] = take(), dot[c] = take();

    for (int64_t k = 0; k < padded; ++k) {
      level_width[k] = level_height[k] = 1, level[k] = 0, start[k] = row[k] = 0;
    }
    for (int c = 0; c < 4; ++c) {
      for (int64_t k = 0; k < length; ++k) dot[c][k] = 0;  // entries past `count` are read but never written
    }
    int64_t first = 0;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
      for (int64_t k = l * p.points; k < (l + 1) * p.points; ++k) {
        level[k] = (Int)l;
        level_width[k] = (T)width, level_height[k] = (T)height;
        start[k] = (Uint)(first * row_stride), row[k] = (Uint)((width + zeros) * row_stride);
      }
      first += (height + 2 * zeros) * (width + zeros);
    }
  }

  MODAT_INLINE int64_t extent(const Samples& s) { return Vectors ? Vectors * W : s.padded; }

  MODAT_INLINE void prefetch(const Samples& s, const T* weights, const T* points) {
    prefetch_row(weights, s.count);
    prefetch_row(points, 2 * s.count);
    __builtin_prefetch(weights + s.count - 1);  // short rows may lie across two lines
  }

  // Fills `attention`; past `count` with zeros.
  MODAT_INLINE void set_attention(const Samples& s, const T* weights, int64_t at) {
    T* attention = s.attention + at;
    if (!s.fused) {
      for (int64_t k = 0; k < extent(s); k += W) S::store(attention + k, S::load_n(weights + k, s.count - k));
      return;
    }
    const V lowest = S::set((T)-__builtin_inf());
    V high = lowest;
    for (int64_t k = 0; k < extent(s); k += W) high = S::at_least(high, logits(s, weights, k, lowest));
    high = S::maximum(high);
    V sum{};
    for (int64_t k = 0; k < extent(s); k += W) {
      const V e = S::exp_nonpositive(logits(s, weights, k, lowest) - high);
      sum += e;
      if constexpr (Vectors == 1) return S::store(attention, e / S::total(sum));
      S::store(attention + k, e);
    }
    const V scale = (T)1 / S::total(sum);
    for (int64_t k = 0; k < extent(s); k += W) S::store(attention + k, S::load(attention + k) * scale);
  }

  // Fills offsets and weights, and what the backward pass needs. `reference` is the query's first reference point.
  template <bool Backward>
  MODAT_INLINE void set_corners(const Samples& s, const Problem& p, const T* points, const T* reference, int64_t at) {
    for (int64_t k = 0; k < extent(s); k += W) {
      V x, y;
      to_pixels(s, p, points, reference, k, 0, x, y);
      const V width = S::load(s.level_width + k), height = S::load(s.level_height + k);
      const Axis horizontal = axis(x, width, S::set_uint(s.stride)), vertical = axis(y, height, S::load_uint(s.row + k));
      set_weights(s, horizontal.fraction, vertical.fraction, at + k);
      const U first = S::load_uint(s.start + k), absent = S::set_uint(s.absent);
      const U above = first + vertical.first, below = first + vertical.second;
      S::store_uint(s.offset[0] + at + k, S::at_most(above + horizontal.first, absent));
      S::store_uint(s.offset[1] + at + k, S::at_most(above + horizontal.second, absent));
      S::store_uint(s.offset[2] + at + k, S::at_most(below + horizontal.first, absent));
      S::store_uint(s.offset[3] + at + k, S::at_most(below + horizontal.second, absent));
      if constexpr (Backward) {
        S::store(s.right + at + k, horizontal.fraction), S::store(s.down + at + k, vertical.fraction);
      }
    }
  }

  // The same where value has a border of zeros: every corner exists, and right corners follow the left ones, which alone
  // get an offset.
  MODAT_INLINE void set_left_corners(const Samples& s, const Problem& p, const T* points, const T* reference,
                                     int64_t at) {
    for (int64_t k = 0; k < extent(s); k += W) {
      V x, y;
      to_pixels(s, p, points, reference, k, border, x, y);
      x = S::at_most(S::at_least(x, V{}), S::load(s.level_width + k) + (T)border);
      y = S::at_most(S::at_least(y, V{}), S::load(s.level_height + k) + (T)border);
      const I low_x = S::to_int(x), low_y = S::to_int(y);  // rounds down: the border keeps coordinates positive
      set_weights(s, x - S::to_float(low_x), y - S::to_float(low_y), at + k);
      const U row = S::load_uint(s.row + k);
      const U above = S::load_uint(s.start + k) + (U)low_y * row + (U)low_x * s.stride;
      S::store_uint(s.offset[0] + at + k, above);
      S::store_uint(s.offset[2] + at + k, above + row);
    }
  }

 private:
  struct Axis {
    V fraction;       // of the way from the first neighbour to the second
    U first, second;  // their offsets, `far` where they are outside
  };

  // The two neighbours of pixel coordinate x on an axis of `size` pixels that are `step` numbers apart.
  MODAT_INLINE Axis axis(V x, V size, U step) {
    x = S::at_most(S::at_least(x, S::set(-2)), size + (T)1);  // clamps distant coordinates and NaN to the range of integers
    const V low = S::floor(x);
    const U first = (U)S::to_int(low), second = first + 1, pixels = (U)S::to_int(size);
    const U at = first * step;
    const U outside = S::set_uint(far);
    return {x - low, first < pixels ? at : outside, second < pixels ? at + step : outside};
  }

  // Coordinates of W samples in pixels of their levels, from `origin` pixels left of and above the centre of the first.
  MODAT_INLINE void to_pixels(const Samples& s, const Problem& p, const T* points, const T* reference, int64_t k,
                              int64_t origin, V& x, V& y) {
    const int64_t left = 2 * (s.count - k);
    const T shift = (T)origin - (T)0.5;
    S::split_pairs(S::load_n(points + 2 * k, left), S::load_n(points + 2 * k + W, left - W), x, y);
    const V width = S::load(s.level_width + k), height = S::load(s.level_height + k);
    if (!s.fused) {
      x = x * width + shift;
      y = y * height + shift;
      return;
    }
    V from_x = S::set(reference[0]), from_y = S::set(reference[1]);
    if (p.reference_l) {
      for (int64_t l = 1; l < p.levels; ++l) {
        const I here = S::load_int(s.level + k) == (Int)l;
        from_x = here ? S::set(reference[l * p.reference_l]) : from_x;
        from_y = here ? S::set(reference[l * p.reference_l + 1]) : from_y;
      }
    }
    x += from_x * width + shift;
    y += from_y * height + shift;
  }

  MODAT_INLINE void set_weights(const Samples& s, V right, V down, int64_t at) {
    const V attention = S::load(s.attention + at);
    const V bottom = attention * down, top = attention - bottom;
    const V top_right = top * right, bottom_right = bottom * right;
    S::store(s.weight[0] + at, top - top_right);
    S::store(s.weight[1] + at, top_right);
    S::store(s.weight[2] + at, bottom - bottom_right);
    S::store(s.weight[3] + at, bottom_right);
  }

  MODAT_INLINE V logits(const Samples& s, const T* weights, int64_t k, V lowest) {
    const V v = S::load_n(weights + k, s.count - k);
    return S::lane() < (Int)(s.count - k) ? v : lowest;
  }
};
