// Counter-based dropout: whether element e is kept depends on (seed, e) only. No mask is stored for the backward pass, and
// it is the same for any number of threads and instruction set. Elements are processed in blocks of 32: each of the 16
// random numbers of a block decides on two elements, 16 apart.

constexpr int64_t dropout_block = 32, dropout_half = 16;

// Two rounds of the 32-bit finaliser of MurmurHash3 (Appleby, 2011), with half of the seed before each.
template <class S>
MODAT_INLINE typename S::U random_bits(typename S::U x, uint64_t seed) {
  x *= 0x9e3779b9u;
  for (int round = 0; round < 2; ++round) {
    x ^= S::set_uint((uint32_t)(seed >> (32 * round)));
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    x ^= x >> 16;
  }
  return x;
}

template <class S, class Stored>
MODAT_INLINE void drop(const Masking& d, typename S::U decision, int64_t element) {
  using V = typename S::V;
  const V x = S::load_n((const Stored*)d.in + element, d.count - element);
  S::store_n((Stored*)d.out + element, decision >= d.threshold ? x * d.scale : V{}, d.count - element);
}

template <int W, class Stored>
void dropout(const Masking& d, int64_t begin, int64_t end) {
  using S = Simd<float, W>;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t k = 0; k < dropout_half; k += W) {
      const auto counter = (typename S::U)S::lane() + (uint32_t)(block * dropout_half + k);
      const auto bits = random_bits<S>(counter, d.seed);
      drop<S, Stored>(d, bits & 0xffff, block * dropout_block + k);
      drop<S, Stored>(d, bits >> 16, block * dropout_block + dropout_half + k);
    }
  }
}
