// Forward pass over (n, q) rows, heads inside: one position of `value` serves all heads while it is in the cache.

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

template <class T, int W, int Channels, class Stored>
void forward_rows(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  using Table = Samples<T, W>;
  const bool fused = p.reference != nullptr;
  Table s(p, scratch, p.value_l, p.heads);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / p.queries, q = index % p.queries;
    const T* points = (const T*)p.samples + n * p.samples_n + q * p.samples_q;
    const T* weights = (const T*)p.weights + n * p.weights_n + q * p.weights_q;
    const Stored* value = (const Stored*)p.value + n * p.value_n;
    Stored* out = (Stored*)p.out + index * p.heads * p.channels;
    if (fused) Table::set_reference(s, p, n, q, 0);
    for (int64_t m = 0; m < p.heads; ++m) Table::set_attention(s, weights + m * s.count, fused, m * s.padded);
    for (int64_t m = 0; m < p.heads; ++m) {
      Table::template set_corners<false>(s, points + 2 * m * s.count, fused, m * s.padded, 0);
    }
    for (int64_t at = 0; at < p.heads * s.padded; at += s.padded, value += p.value_m, out += p.channels) {
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
}

template <class T, int W, class Stored>
void forward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if constexpr (sizeof(T) == 4) {
    if (p.channels == 32) return forward_rows<T, W, 32, Stored>(p, begin, end, scratch);
    if (p.channels == 64) return forward_rows<T, W, 64, Stored>(p, begin, end, scratch);
  }
  forward_rows<T, W, 0, Stored>(p, begin, end, scratch);
}

template <class T, int W>
int64_t forward_scratch(const Problem& p) {
  return Samples<T, W>::bytes(p, p.heads);
}
