// Forward pass over (n, m, q): queries within a slice of `value`, which is first packed into contiguous scratch memory in
// the work type. Unpacked rows, M * D apart, are spread over M times as many pages and miss the L1 cache more often, and
// narrow types would be converted for each corner read. Packing adds borders of zeros, so the corners of a sample have
// fixed distances and need no bounds checks.

// Corner c of sample k, or null where it is outside (never if value is packed). `Channels` per row, 0 if known
// at run time only.
template <bool Packed, int Channels, class Source, class Table>
MODAT_INLINE const Source* corner_of(const Source* value, const Table& s, int c, int64_t k) {
  if (Packed) return value + s.offset[c & 2][k] + (c & 1) * (Channels ? Channels : (int64_t)s.stride);
  return s.offset[c][k] == s.absent ? nullptr : value + s.offset[c][k];
}

// Weighted sum of all corners of one head, for NV vectors of channels starting at `value`.
template <class T, int W, int NV, bool Packed, int Channels, class Source, class Stored, class Table>
MODAT_INLINE void gather(const Source* value, const Table& s, int64_t at, Stored* out) {
  using S = Simd<T, W>;
  using V = typename S::V;
  // Separate sums for the corners hide the latency of the additions, if there are enough registers.
  constexpr int fit = MODAT_REGISTERS / 2 / NV;
  constexpr int sets = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  V sum[sets][NV] = {};
#pragma GCC unroll 4
  for (int64_t k = at; k < at + s.count; ++k) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Source* corner = corner_of<Packed, Channels>(value, s, c, k);
      if (!Packed && !corner) continue;
      const T weight = s.weight[c][k];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum[c % sets][j] += weight * S::load(corner + j * W);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < NV; ++j) {
    V all = sum[0][j];
    for (int c = 1; c < sets; ++c) all += sum[c][j];
    S::store(out + j * W, all);
  }
}

// Remaining channels, fewer than a vector.
template <class T, int W, bool Packed, class Source, class Stored, class Table>
MODAT_INLINE void gather_rest(const Source* value, const Table& s, int64_t at, Stored* out, int64_t channels) {
  using S = Simd<T, W>;
  typename S::V sum{};
  for (int64_t k = at; k < at + s.count; ++k) {
    for (int c = 0; c < 4; ++c) {
      const Source* corner = corner_of<Packed, 0>(value, s, c, k);
      if (Packed || corner) sum += s.weight[c][k] * S::load_n(corner, channels);
    }
  }
  S::store_n(out, sum, channels);
}

template <class T, int W, class Stored>
MODAT_INLINE void widen_row(const Stored* from, T* to, int64_t channels) {
  using S = Simd<T, W>;
  for (int64_t d = 0; d < channels; d += W) S::store_n(to + d, S::load_n(from + d, channels - d), channels - d);
}

template <bool Packed, class T, class Stored>
struct SourceOf {
  using Type = T;
};
template <class T, class Stored>
struct SourceOf<false, T, Stored> {
  using Type = Stored;
};

// Pixels of a packed slice. Each level has `border` rows of zeros above and below, and that many zeros before each row,
// shared with the end of the row above.
MODAT_INLINE int64_t packed_rows(const Problem& p) {
  int64_t rows = border;
  for (int64_t l = 0; l < p.levels; ++l) rows += (p.shapes[2 * l] + 2 * border) * (p.shapes[2 * l + 1] + border);
  return rows;
}

// Does not touch the zeros.
template <class T, int W, class Stored>
MODAT_INLINE void pack_slice(const Problem& p, const Stored* from, T* to, int64_t channels) {
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1], around = border * (width + border);
    to += around * channels;
    for (int64_t y = 0; y < height; ++y) {
      to += border * channels;
      for (int64_t x = 0; x < width; ++x, from += p.value_l, to += channels) {
        prefetch_row(from + ahead * p.value_l, channels);
        widen_row<T, W>(from, to, channels);
      }
    }
    to += around * channels;
  }
}

// Packing does not pay if few samples are read from many rows; offsets are 32-bit numbers.
MODAT_INLINE bool pays_to_pack(const Problem& p) {
  const int64_t rows = packed_rows(p);
  return p.queries * p.levels * p.points >= rows && rows * p.channels <= (int64_t)1 << 30;
}

template <class Stored>
MODAT_INLINE const Stored* slice_of(const Problem& p, int64_t slice) {
  return (const Stored*)p.value + slice / p.heads * p.value_n + slice % p.heads * p.value_m;
}

template <class T, int W, int Vectors, int Channels, bool Packed, class Stored>
void forward_queries(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  using Table = Samples<T, W, Vectors>;
  using Source = typename SourceOf<Packed, T, Stored>::Type;
  const int64_t channels = Channels ? Channels : p.channels;
  T* packed = (T*)((char*)scratch + Table::bytes(p, together));
  Table s(p, scratch, Packed ? p.channels : p.value_l, Table::far, together, Packed ? border : 0);
  if (Packed) __builtin_memset(packed, 0, packed_rows(p) * p.channels * sizeof(T));
  while (begin < end) {
    const int64_t slice = begin / p.queries, n = slice / p.heads, m = slice % p.heads;
    const int64_t until = end < (slice + 1) * p.queries ? end - slice * p.queries : p.queries;
    const bool more = Packed && slice * p.queries + until < end;
    const Stored* stored = slice_of<Stored>(p, slice);
    const Stored* next_value = slice_of<Stored>(p, slice + 1);
    const Source* value = (const Source*)stored;
    if (Packed) {
      pack_slice<T, W>(p, stored, packed, channels);
      value = (const Source*)packed;
    }
    const T* points = (const T*)p.samples + n * p.samples_n + 2 * m * s.count;
    const T* weights = (const T*)p.weights + n * p.weights_n + m * s.count;
    const T* reference = (const T*)p.reference + n * p.reference_n;
    for (int64_t first = begin % p.queries; first < until; first += together) {
      const int64_t last = first + together < until ? first + together : until;
      for (int64_t q = first + ahead; q < last + ahead; ++q) {
        Table::prefetch(s, weights + q * p.weights_q, points + q * p.samples_q);
      }
      for (int64_t l = first * p.rows / p.queries; more && l < last * p.rows / p.queries; ++l) {
        prefetch_row(next_value + l * p.value_l, channels);
      }
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) Table::set_attention(s, weights + q * p.weights_q, at);
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        const T *sample = points + q * p.samples_q, *from = reference + q * p.reference_q;
        if constexpr (Packed) {
          Table::set_left_corners(s, p, sample, from, at);
        } else {
          Table::template set_corners<false>(s, p, sample, from, at);
        }
      }
      Stored* out = (Stored*)p.out + ((n * p.queries + first) * p.heads + m) * p.channels;
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded, out += p.heads * channels) {
        prefetch_row(out + ahead * p.heads * channels, channels);
        if constexpr (Channels > 0) {
          gather<T, W, Channels / W, Packed, Channels>(value, s, at, out);
        } else {
          int64_t d = 0;
          for (; d + 4 * W <= p.channels; d += 4 * W) gather<T, W, 4, Packed, 0>(value + d, s, at, out + d);
          for (; d + W <= p.channels; d += W) gather<T, W, 1, Packed, 0>(value + d, s, at, out + d);
          if (d < p.channels) gather_rest<T, W, Packed>(value + d, s, at, out + d, p.channels - d);
        }
      }
    }
    begin = slice * p.queries + until;
  }
}

template <class T, int W, class Stored>
void forward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int few = 16 / W;
  if (!pays_to_pack(p)) return forward_queries<T, W, 0, 0, false, Stored>(p, begin, end, scratch);
  if constexpr (sizeof(T) == 4) {
    if (p.levels * p.points <= 16) {
      if (p.channels == 32) return forward_queries<T, W, few, 32, true, Stored>(p, begin, end, scratch);
      if (p.channels == 64) return forward_queries<T, W, few, 64, true, Stored>(p, begin, end, scratch);
    }
  }
  forward_queries<T, W, 0, 0, true, Stored>(p, begin, end, scratch);
}

template <class T, int W, class Stored>
int64_t forward_scratch(const Problem& p) {
  const int64_t tables = Samples<T, W, 16 / W>::bytes(p, together), any = Samples<T, W, 0>::bytes(p, together);
  return (tables > any ? tables : any) + (pays_to_pack(p) ? packed_rows(p) * p.channels * (int64_t)sizeof(T) : 0);
}
