// Vectors of W numbers by the compilers' vector extensions: one source for AVX-512, AVX2, SSE2 and NEON.
// Included inside the namespace of one instruction set, below its target pragma; hence no include guard and no headers.

#define MODAT_INLINE __attribute__((always_inline)) static inline

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct SameSizeInt {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct SameSizeInt<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
};

template <int... L>
struct Lanes {};
template <int N, int... L>
struct MakeLanes : MakeLanes<N - 1, N - 1, L...> {};
template <int... L>
struct MakeLanes<0, L...> {
  using Type = Lanes<L...>;
};

template <class T, int W>
struct Simd {
  using Int = typename SameSizeInt<T>::Signed;
  using Uint = typename SameSizeInt<T>::Unsigned;
  typedef T V __attribute__((vector_size(W * sizeof(T))));
  typedef Int I __attribute__((vector_size(W * sizeof(T))));
  typedef Uint U __attribute__((vector_size(W * sizeof(T))));
  typedef uint16_t Short __attribute__((vector_size(W * 2)));
  static constexpr int width = W;

  MODAT_INLINE V set(T x) { return x - V{}; }
  MODAT_INLINE V to_float(I i) { return __builtin_convertvector(i, V); }
  MODAT_INLINE I to_int(V v) { return __builtin_convertvector(v, I); }
  // NaN gives the bound.
  MODAT_INLINE V at_least(V v, V low) { return v > low ? v : low; }
  MODAT_INLINE V at_most(V v, V high) { return v < high ? v : high; }

  MODAT_INLINE U set_uint(Uint x) { return x - U{}; }
  MODAT_INLINE U at_most(U v, U high) { return v < high ? v : high; }
  MODAT_INLINE V floor(V x) {  // of numbers that an integer can hold
#if defined(MODAT_AVX512)
    if constexpr (sizeof(T) == 4) return (V)_mm512_roundscale_ps((__m512)x, 1 | 8);
#elif defined(MODAT_AVX2)
    if constexpr (sizeof(T) == 4) return (V)_mm256_floor_ps((__m256)x);
#endif
    const V whole = to_float(to_int(x));
    return whole > x ? whole - (T)1 : whole;
  }

  MODAT_INLINE U load_uint(const Uint* p) {
    U v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  MODAT_INLINE void store_uint(Uint* p, U v) { __builtin_memcpy(p, &v, sizeof(v)); }
  MODAT_INLINE I load_int(const Int* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }

  MODAT_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  MODAT_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }

  MODAT_INLINE V load(const BFloat16* p) {
    Short bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return (V)(__builtin_convertvector(bits, U) << 16);
  }
  MODAT_INLINE void store(BFloat16* p, V v) {
    const U bits = (U)v;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
    const U quiet = (bits >> 16) | 0x40;
    const Short out = __builtin_convertvector((U)(v == v ? (I)rounded : (I)quiet), Short);
    __builtin_memcpy(p, &out, sizeof(out));
  }

#if defined(MODAT_AVX512)
  MODAT_INLINE V load(const Half* p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  MODAT_INLINE void store(Half* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(MODAT_AVX2)
  MODAT_INLINE V load(const Half* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  MODAT_INLINE void store(Half* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
  __attribute__((noinline)) static V load(const Half* p) {
    V v{};
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i].bits);
    return v;
  }
  __attribute__((noinline)) static void store(Half* p, V v) {
    for (int i = 0; i < W; ++i) p[i].bits = float_to_half(v[i]);
  }
#endif

  // The first n of W numbers, zeros behind them. n <= 0 reads nothing.
  template <class S>
  MODAT_INLINE V load_n(const S* p, int64_t n) {
    if (n >= W) return load(p);
    if (n <= 0) return V{};
#if defined(MODAT_AVX512)
    if constexpr (sizeof(S) == 4) return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(MODAT_AVX2)
    if constexpr (sizeof(S) == 4) return (V)_mm256_maskload_ps((const float*)p, (__m256i)(lane() < (Int)n));
#endif
    S copy[W] = {};
    __builtin_memcpy(copy, p, n * sizeof(S));
    return load(copy);
  }
  template <class S>
  MODAT_INLINE void store_n(S* p, V v, int64_t n) {
    if (n >= W) return store(p, v);
    if (n <= 0) return;
#if defined(MODAT_AVX512)
    if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(MODAT_AVX2)
    if constexpr (sizeof(S) == 4) return _mm256_maskstore_ps((float*)p, (__m256i)(lane() < (Int)n), (__m256)v);
#endif
    S copy[W];
    store(copy, v);
    __builtin_memcpy(p, copy, n * sizeof(S));
  }

  MODAT_INLINE I lane() { return lane_of(typename MakeLanes<W>::Type{}); }
  template <int... L>
  MODAT_INLINE I lane_of(Lanes<L...>) {
    return I{L...};
  }

  template <int... L>
  MODAT_INLINE V pick(V a, V b) {  // lane i: number L[i] of a followed by b
#if defined(__clang__)
    return __builtin_shufflevector(a, b, L...);
#else
    return __builtin_shuffle(a, b, I{L...});
#endif
  }

  // x0 y0 x1 y1 ... in (a, b) -> x, y; and back.
  template <int... L>
  MODAT_INLINE void split_pairs(V a, V b, V& x, V& y, Lanes<L...>) {
    x = pick<(2 * L)...>(a, b);
    y = pick<(2 * L + 1)...>(a, b);
  }
  MODAT_INLINE void split_pairs(V a, V b, V& x, V& y) { split_pairs(a, b, x, y, typename MakeLanes<W>::Type{}); }
  template <int... L>
  MODAT_INLINE void join_pairs(V x, V y, V& a, V& b, Lanes<L...>) {
    a = pick<(L / 2 + (L % 2) * W)...>(x, y);
    b = pick<(W / 2 + L / 2 + (L % 2) * W)...>(x, y);
  }
  MODAT_INLINE void join_pairs(V x, V y, V& a, V& b) { join_pairs(x, y, a, b, typename MakeLanes<W>::Type{}); }

  MODAT_INLINE T sum(V v) {
    T total = 0;
    for (int i = 0; i < W; ++i) total += v[i];
    return total;
  }

  // Sums of W vectors at once: lane i of the result is the sum of v[i]. Overwrites v.
  MODAT_INLINE V sums(V* v) { return fold<W / 2>(v); }
  template <int H>
  MODAT_INLINE V fold(V* v) {
    if constexpr (H == 0) {
      return v[0];
    } else {
      for (int i = 0; i < H; ++i) v[i] = halves<H>(v[i], v[i + H], typename MakeLanes<W>::Type{});
      return fold<H / 2>(v);
    }
  }
  template <int H, int... L>
  MODAT_INLINE V halves(V a, V b, Lanes<L...>) {
    return pick<((L & H) ? L + W : L)...>(a, b) + pick<((L & H) ? (L ^ H) + W : (L ^ H))...>(a, b);
  }

  template <int H, int... L>
  MODAT_INLINE V rotated(V v, Lanes<L...>) {
    return pick<(L ^ H)...>(v, v);
  }
  template <int H = W / 2>
  MODAT_INLINE V maximum(V v) {  // in every lane
    if constexpr (H == 0) {
      return v;
    } else {
      return maximum<H / 2>(at_least(v, rotated<H>(v, typename MakeLanes<W>::Type{})));
    }
  }
  template <int H = W / 2>
  MODAT_INLINE V total(V v) {  // in every lane
    if constexpr (H == 0) {
      return v;
    } else {
      return total<H / 2>(v + rotated<H>(v, typename MakeLanes<W>::Type{}));
    }
  }

  // exp of numbers <= 0: 2^n * e^r with |r| <= ln(2) / 2 and the degree 6 polynomial of Cephes, within 2 units in the
  // last place; 0 below -87. Doubles (used where gradients are checked) go through libm.
  MODAT_INLINE V exp_nonpositive(V x) {
    if constexpr (sizeof(T) == 8) {
      for (int i = 0; i < W; ++i) x[i] = __builtin_exp(x[i]);
      return x;
    } else {
      const V clamped = x < set(-87.0f) ? set(-87.0f) : x;  // NaN stays
      const I n = to_int(clamped * 1.44269504f - 0.5f);     // rounds to nearest: the argument is negative
      const V whole = to_float(n);
      const V r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
      V p = set(1.9875691500e-4f);
      p = p * r + 1.3981999507e-3f;
      p = p * r + 8.3334519073e-3f;
      p = p * r + 4.1665795894e-2f;
      p = p * r + 1.6666665459e-1f;
      p = p * r + 5.0000001201e-1f;
      p = p * (r * r) + r + 1.0f;
      const V scale = (V)((n + 127) << 23);
      return x < set(-87.0f) ? V{} : p * scale;
    }
  }

 private:
  MODAT_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
    uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    if (exponent == 31) bits = sign | 0x7f800000 | (fraction << 13);
    float out;
    __builtin_memcpy(&out, &bits, 4);
    if (exponent == 0) out = (sign ? -1.0f : 1.0f) * (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    return out;
  }
  MODAT_INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint16_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds past the largest half
    if (bits < 0x38800000) {                       // below the normal range: adding 0.5 rounds at 2^-24
      float tiny;
      __builtin_memcpy(&tiny, &bits, 4);
      tiny += 0.5f;
      __builtin_memcpy(&bits, &tiny, 4);
      return sign | (uint16_t)(bits - 0x3f000000);
    }
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
  }
};
