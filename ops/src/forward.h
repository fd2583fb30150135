// Forward pass over (n, m, q): queries inside a slice of `value`, which is packed into contiguous scratch first. Rows that
// lie M * D apart in memory would be spread over M times as many pages, and miss the first-level cache far more often.

// Weighted sum of all corners of one head, for NV vectors of channels starting at `value`.
template <class T, int W, int NV, class Stored>
MODAT_INLINE void gather(const Stored* value, const Samples<T, W>& s, int64_t at, Stored* out) {
  using S = Simd<T, W>;
  using V = typename S::V;
  // Separate sums for the corners hide the latency of the additions, as far as there are registers for them.
  constexpr int fit = MODAT_REGISTERS / 2 / NV;
  constexpr int sets = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  V sum[sets][NV] = {};
  for (int64_t k = at; k < at + s.count; ++k) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const T weight = s.weight[c][k];
      const Stored* corner = value + s.offset[c][k];
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

// The channels that do not fill a vector.
template <class T, int W, class Stored>
MODAT_INLINE void gather_rest(const Stored* value, const Samples<T, W>& s, int64_t at, Stored* out, int64_t channels) {
  using S = Simd<T, W>;
  typename S::V sum{};
  for (int64_t k = at; k < at + s.count; ++k) {
    for (int c = 0; c < 4; ++c) sum += s.weight[c][k] * S::load_n(value + s.offset[c][k], channels);
  }
  S::store_n(out, sum, channels);
}

// Whatever the type, bits unchanged.
template <class T, int W, class Stored>
MODAT_INLINE void copy_row(const Stored* from, Stored* to, int64_t channels) {
  if (channels % W == 0) {
    for (int64_t d = 0; d < channels; d += W) __builtin_memcpy(to + d, from + d, W * sizeof(Stored));
  } else {
    __builtin_memcpy(to, from, channels * sizeof(Stored));
  }
}

// Where few samples are read from many rows, packing would cost more than it saves.
MODAT_INLINE bool pays_to_pack(const Problem& p) { return p.queries * p.levels * p.points >= p.rows; }

constexpr int64_t forward_together = 4;  // queries whose tables are made at once

template <class T, int W, int Channels, class Stored>
void forward_queries(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  using Table = Samples<T, W>;
  const bool fused = p.reference != nullptr, packs = pays_to_pack(p);
  Stored* packed = (Stored*)((char*)scratch + Table::bytes(p, forward_together));
  Table s(p, scratch, packs ? p.channels : p.value_l, forward_together);
  while (begin < end) {
    const int64_t slice = begin / p.queries, n = slice / p.heads, m = slice % p.heads;
    const int64_t until = end < (slice + 1) * p.queries ? end - slice * p.queries : p.queries;
    const Stored* value = (const Stored*)p.value + n * p.value_n + m * p.value_m;
    if (packs) {
      for (int64_t l = 0; l < p.rows; ++l) copy_row<T, W>(value + l * p.value_l, packed + l * p.channels, p.channels);
      value = packed;
    }
    const T* points = (const T*)p.samples + n * p.samples_n + 2 * m * s.count;
    const T* weights = (const T*)p.weights + n * p.weights_n + m * s.count;
    for (int64_t first = begin % p.queries; first < until; first += forward_together) {
      const int64_t last = first + forward_together < until ? first + forward_together : until;
      Table::prefetch(p, points, weights, last, last + forward_together);
      for (int64_t q = first, at = 0; fused && q < last; ++q, at += s.padded) Table::set_reference(s, p, n, q, at);
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        Table::set_attention(s, weights + q * p.weights_q, fused, at);
      }
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded) {
        Table::template set_corners<false>(s, points + q * p.samples_q, fused, at, at);
      }
      Stored* out = (Stored*)p.out + ((n * p.queries + first) * p.heads + m) * p.channels;
      for (int64_t q = first, at = 0; q < last; ++q, at += s.padded, out += p.heads * p.channels) {
        if constexpr (Channels > 0) {
          gather<T, W, Channels / W>(value, s, at, out);
        } else {
          int64_t d = 0;
          for (; d + 4 * W <= p.channels; d += 4 * W) gather<T, W, 4>(value + d, s, at, out + d);
          for (; d + W <= p.channels; d += W) gather<T, W, 1>(value + d, s, at, out + d);
          if (d < p.channels) gather_rest<T, W>(value + d, s, at, out + d, p.channels - d);
        }
      }
    }
    begin = slice * p.queries + until;
  }
}

template <class T, int W, class Stored>
void forward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if constexpr (sizeof(T) == 4) {
    if (p.channels == 32) return forward_queries<T, W, 32, Stored>(p, begin, end, scratch);
    if (p.channels == 64) return forward_queries<T, W, 64, Stored>(p, begin, end, scratch);
  }
  forward_queries<T, W, 0, Stored>(p, begin, end, scratch);
}

template <class T, int W, class Stored>
int64_t forward_scratch(const Problem& p) {
  return Samples<T, W>::bytes(p, forward_together) + (pays_to_pack(p) ? p.rows * p.channels * (int64_t)sizeof(Stored) : 0);
}
