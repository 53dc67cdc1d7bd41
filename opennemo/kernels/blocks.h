// Products with weights as GGUF files hold them, in blocks of codes.
//
// In every type of block a weight is `scale * code - min`, where 32 or 16 weights share scale and
// min. Inputs are int8 codes that share a scale by 32. So the part of a product that one group
// contributes is
//     x_scale * (scale * sum(code * x) - min * sum(x)),
// where the first sum is of integers and exact, and the second is known once for a token.
//
// A file's rows are rearranged, in the same number of bits: a panel has 32 rows, and each vector
// holds the codes of as many of them, so that the sums of a product need not be gathered from their
// lanes. Along K, 256 weights of a row are a span, and 8 spans are a chunk. What a chunk holds is
// in the order in which it is read: group 0 of each span, group 1 of each, to group 7.
//
// That is also the order of additions, so a token's result has the same bits in any batch: group i of
// each span of a chunk adds to sum i; the 8 sums of a chunk are added to the result from the first to
// the last. In a group of 32 that has two scales, the first 16 come first.
//
// Layouts of blocks: ggml-common.h and the dequantisation in the `gguf` package, which tests compare
// with.

#include <tuple>

constexpr int SPAN = 256, LANES = 8, CHUNK = 8;  // weights and groups of a span, spans of a chunk
constexpr int LOW = 6;                           // tokens in a tile: sums and totals fit in registers
constexpr int AHEAD = 2048;                      // bytes that are fetched ahead

#define INLINE inline __attribute__((always_inline))

typedef float f4x __attribute__((vector_size(16)));
typedef float f16x __attribute__((vector_size(64)));
typedef uint8_t b32 __attribute__((vector_size(32)));
typedef uint16_t s16 __attribute__((vector_size(32)));
typedef uint8_t b32_any __attribute__((vector_size(32), aligned(1), may_alias));

// ---- arithmetic that no compiler may reorder or round in two ways ---------------------------------

// c + a * b and c - a * b, rounded once where the processor can.
#if defined(__FMA__)
static inline f8x add_product(f8x c, f8x a, f8x b) { return (f8x)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline f8x take_product(f8x c, f8x a, f8x b) { return (f8x)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
static inline f4x add_product(f4x c, f4x a, f4x b) { return (f4x)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline f4x take_product(f4x c, f4x a, f4x b) { return (f4x)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
static inline f4x add_product(f4x c, f4x a, f4x b) { return c + a * b; }
static inline f4x take_product(f4x c, f4x a, f4x b) { return c - a * b; }
#endif
#if defined(__AVX512F__)
static inline f16x add_product(f16x c, f16x a, f16x b) { return (f16x)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline f16x take_product(f16x c, f16x a, f16x b) { return (f16x)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#endif
#if !defined(__AVX512F__)
// A vector that is wider than the processor's, by its halves.
template <class Wide, class Half, class F> static inline Wide by_halves(Wide c, Wide a, Wide b, F f) {
  union Two { Wide wide; Half half[2]; } x{c}, y{a}, z{b};
  for (int i = 0; i < 2; i++) x.half[i] = f(x.half[i], y.half[i], z.half[i]);
  return x.wide;
}
#if !defined(__FMA__)
static inline f8x add_product(f8x c, f8x a, f8x b) {
  return by_halves<f8x, f4x>(c, a, b, [](f4x c, f4x a, f4x b) { return add_product(c, a, b); });
}
static inline f8x take_product(f8x c, f8x a, f8x b) {
  return by_halves<f8x, f4x>(c, a, b, [](f4x c, f4x a, f4x b) { return take_product(c, a, b); });
}
#endif
#if defined(VNNI)  // emulated
static inline f16x add_product(f16x c, f16x a, f16x b) {
  return by_halves<f16x, f8x>(c, a, b, [](f8x c, f8x a, f8x b) { return add_product(c, a, b); });
}
static inline f16x take_product(f16x c, f16x a, f16x b) {
  return by_halves<f16x, f8x>(c, a, b, [](f8x c, f8x a, f8x b) { return take_product(c, a, b); });
}
#endif
#endif

// What a group adds to a sum; the lanes are groups, or rows of weights.
template <class F> static inline F term(F total, F sums, F scale, F min, F x_sum, F x_scale) {
  return add_product(total, take_product(sums * scale, min, x_sum), x_scale);
}

// Sums of products of bytes. The code of a weight has at most BITS bits without a sign; where the
// processor multiplies bytes by signs, codes of 8 bits have one, elsewhere they are larger by BIAS8.
#if defined(VNNI) || defined(__AVXVNNI__)
constexpr int BIAS8 = 128;
#define UNSIGNED_DOT 1
#else
constexpr int BIAS8 = 0;
#endif

// In each lane: acc + the products of four codes and four inputs.
template <class I> static inline I dot4(I acc, I w, I x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  if constexpr (sizeof(I) == 64) return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
  else return (I)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVXVNNI__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__ARM_FEATURE_DOTPROD)
  union Parts { I whole; int32x4_t part[sizeof(I) / 16]; } c{acc}, a{w}, b{x};
  for (size_t i = 0; i < sizeof(I) / 16; i++)
    c.part[i] = vdotq_s32(c.part[i], vreinterpretq_s8_s32(a.part[i]), vreinterpretq_s8_s32(b.part[i]));
  return c.whole;
#else
  for (int byte = 0; byte < 32; byte += 8) {
#if defined(UNSIGNED_DOT)
    I code = w >> byte & 255;
#else
    I code = w << (24 - byte) >> 24;
#endif
    acc += code * (x << (24 - byte) >> 24);
  }
  return acc;
#endif
}

#if defined(__AVX2__) && !defined(UNSIGNED_DOT)
#define PAIRS 1
// The product of bytes that AVX2 has adds pairs in 16 bits and saturates. Codes of up to 6 bits never
// reach that; so many such products may even be added before they must be widened.
template <int BITS> constexpr int BEFORE_WIDENING = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
template <int BITS> static inline __m256i pairs(__m256i w, __m256i x) {
  if constexpr (BITS == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  else return _mm256_maddubs_epi16(w, x);
}
static inline i8x widened(__m256i x) { return (i8x)_mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
#endif

// ---- inputs -----------------------------------------------------------------------------------

struct Input {  // of a token, group i of each span of a chunk; they lie in the order of i
  alignas(64) int8_t codes[CHUNK][GROUP];
  float scale[CHUNK], sum[CHUNK];  // the codes' scale and sum
  float half_sum[2][CHUNK];        // of the first and the second 16
};

static inline int spans_of(int n_groups) { return (n_groups + LANES - 1) / LANES; }
static inline int inputs_of(int n_groups) { return (spans_of(n_groups) + CHUNK - 1) / CHUNK * LANES; }

static void round_inputs(const float* x, int n_groups, Input* to) {
  for (int group = 0; group < n_groups; group++, x += GROUP) {
    const int s = group / LANES % CHUNK;
    Input& in = to[group / (CHUNK * LANES) * LANES + group % LANES];
    vf most = splat(1e-12f);
    for (int i = 0; i < GROUP; i += W) most = larger(most, magnitude(load(x + i)));
    const float step = largest(most) / 127.f;
    typedef int8_t narrow __attribute__((vector_size(W), aligned(1), may_alias));
    const vf magic = splat(12582912.f);
    int32_t sums[2] = {};
    for (int i = 0; i < GROUP; i += W) {
      vi code = __builtin_convertvector((load(x + i) / step + magic) - magic, vi);
      *(narrow*)(in.codes[s] + i) = __builtin_convertvector(code, narrow);
      for (int j = 0; j < W; j++) sums[(i + j) / 16] += code[j];
    }
    in.scale[s] = step, in.sum[s] = sums[0] + sums[1];
    in.half_sum[0][s] = sums[0], in.half_sum[1][s] = sums[1];
  }
}

// ---- blocks -----------------------------------------------------------------------------------

struct Span {  // of one row
  b32 codes[LANES];
  // Scales, then minima. Of a group: float16 numbers, or small ones for its halves, times `unit`.
  uint16_t number[2][LANES];
  int8_t small[2][2][LANES];
  uint16_t unit[2];  // float16
};

static inline b32 bytes32(const void* p) { return *(const b32_any*)p; }
static inline b32 right(b32 x, int bits) { return (b32)((s16)x >> bits); }  // into the next byte, too:
static inline b32 left(b32 x, int bits) { return (b32)((s16)x << bits); }   // mask what comes out
template <class I = uint16_t> static inline I word(const uint8_t* p) {
  I x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline uint32_t dword(const uint8_t* p) { return word<uint32_t>(p); }

// 16 bytes: their lower halves, then their upper halves.
static inline b32 nibbles(const uint8_t* p) {
  b32 y;
  for (int i = 0; i < 16; i++) y[i] = p[i] & 15, y[16 + i] = p[i] >> 4;
  return y;
}

// Bit i of x as byte i, 0 or 16.
static inline b32 fifth_bits(uint32_t x) {
  b32 y;
  for (int i = 0; i < 32; i++) y[i] = (x >> i & 1) << 4;
  return y;
}

// The scales and minima of Q4_K and Q5_K, of six bits each.
static inline void six_bits(const uint8_t* p, Span& to) {
  to.unit[0] = word(p), to.unit[1] = word(p + 2);
  const uint32_t a = dword(p + 4), b = dword(p + 8), c = dword(p + 12);
  const uint32_t parts[2][2] = {
    {a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030)},
    {b & 0x3F3F3F3F, (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030)},
  };
  for (int i = 0; i < 2; i++) std::memcpy(to.small[i][0], parts[i], LANES);
}

// A type of block: how many weights in how many bytes, bits of a code, whether 16 weights share a
// scale (else 32), and how 256 weights become a span. A min is the scale times MIN, or a number of
// its own. Bytes that are zero must give scale and min zero.
struct Of32 {
  static constexpr int WEIGHTS = 32;
  static constexpr bool HALVES = false, OWN_MIN = false, LOOKED_UP = false;
};
struct Of256 : Of32 {
  static constexpr int WEIGHTS = 256;
};

struct Q4_0 : Of32 {
  static constexpr int BYTES = 18, BITS = 4, MIN = 8;
  static void unpack(const uint8_t* p, Span& to) {
    for (int i = 0; i < 8; i++, p += BYTES) to.number[0][i] = word(p), to.codes[i] = nibbles(p + 2);
  }
};
struct Q4_1 : Of32 {
  static constexpr int BYTES = 20, BITS = 4, MIN = -1;
  static constexpr bool OWN_MIN = true;
  static void unpack(const uint8_t* p, Span& to) {
    for (int i = 0; i < 8; i++, p += BYTES) {
      to.number[0][i] = word(p), to.number[1][i] = word(p + 2);
      to.codes[i] = nibbles(p + 4);
    }
  }
};
struct Q5_0 : Of32 {
  static constexpr int BYTES = 22, BITS = 5, MIN = 16;
  static void unpack(const uint8_t* p, Span& to) {
    for (int i = 0; i < 8; i++, p += BYTES) {
      to.number[0][i] = word(p);
      to.codes[i] = nibbles(p + 6) | fifth_bits(dword(p + 2));
    }
  }
};
struct Q5_1 : Of32 {
  static constexpr int BYTES = 24, BITS = 5, MIN = -1;
  static constexpr bool OWN_MIN = true;
  static void unpack(const uint8_t* p, Span& to) {
    for (int i = 0; i < 8; i++, p += BYTES) {
      to.number[0][i] = word(p), to.number[1][i] = word(p + 2);
      to.codes[i] = nibbles(p + 8) | fifth_bits(dword(p + 4));
    }
  }
};
struct Q8_0 : Of32 {
  static constexpr int BYTES = 34, BITS = 8, MIN = BIAS8;
  static void unpack(const uint8_t* p, Span& to) {
    for (int i = 0; i < 8; i++, p += BYTES)
      to.number[0][i] = word(p), to.codes[i] = bytes32(p + 2) ^ (uint8_t)BIAS8;
  }
};
struct IQ4_NL : Of32 {
  static constexpr int BYTES = 18, BITS = 8, MIN = BIAS8;
  static constexpr bool LOOKED_UP = true;
  static void unpack(const uint8_t* p, Span& to) { Q4_0::unpack(p, to); }
};

struct Q2_K : Of256 {
  static constexpr int BYTES = 84, BITS = 2, MIN = 1;
  static constexpr bool HALVES = true, OWN_MIN = true;
  static void unpack(const uint8_t* p, Span& to) {
    to.unit[0] = word(p + 80), to.unit[1] = word(p + 82);
    for (int i = 0; i < 16; i++)
      to.small[0][i % 2][i / 2] = p[i] & 15, to.small[1][i % 2][i / 2] = p[i] >> 4;
    for (int i = 0; i < 8; i++) to.codes[i] = right(bytes32(p + 16 + i / 4 * 32), 2 * (i % 4)) & 3;
  }
};
struct Q3_K : Of256 {
  static constexpr int BYTES = 110, BITS = 3, MIN = 4;
  static constexpr bool HALVES = true;
  static void unpack(const uint8_t* p, Span& to) {
    to.unit[0] = word(p + 108);
    for (int i = 0; i < 16; i++) {
      const int low = p[96 + i % 8] >> i / 8 * 4 & 15, high = p[104 + i % 4] >> i / 4 * 2 & 3;
      to.small[0][i % 2][i / 2] = (low | high << 4) - 32;
    }
    b32 high = bytes32(p);
    for (int i = 0; i < 8; i++) {
      b32 low = right(bytes32(p + 32 + i / 4 * 32), 2 * (i % 4)) & 3;
      to.codes[i] = low | left(right(high, i) & 1, 2);
    }
  }
};
struct Q4_K : Of256 {
  static constexpr int BYTES = 144, BITS = 4, MIN = 1;
  static constexpr bool OWN_MIN = true;
  static void unpack(const uint8_t* p, Span& to) {
    six_bits(p, to);
    for (int i = 0; i < 8; i += 2) {
      b32 x = bytes32(p + 16 + 16 * i);
      to.codes[i] = x & 15, to.codes[i + 1] = right(x, 4) & 15;
    }
  }
};
struct Q5_K : Of256 {
  static constexpr int BYTES = 176, BITS = 5, MIN = 1;
  static constexpr bool OWN_MIN = true;
  static void unpack(const uint8_t* p, Span& to) {
    six_bits(p, to);
    b32 high = bytes32(p + 16);
    for (int i = 0; i < 8; i += 2) {
      b32 x = bytes32(p + 48 + 16 * i);
      to.codes[i] = (x & 15) | left(right(high, i) & 1, 4);
      to.codes[i + 1] = (right(x, 4) & 15) | left(right(high, i + 1) & 1, 4);
    }
  }
};
struct Q6_K : Of256 {
  static constexpr int BYTES = 210, BITS = 6, MIN = 32;
  static constexpr bool HALVES = true;
  static void unpack(const uint8_t* p, Span& to) {
    to.unit[0] = word(p + 208);
    for (int i = 0; i < 16; i++) to.small[0][i % 2][i / 2] = (int8_t)p[192 + i];
    for (int i = 0; i < 8; i++) {
      const uint8_t* low = p + i / 4 * 64 + i % 2 * 32;
      b32 high = right(bytes32(p + 128 + i / 4 * 32), 2 * (i % 4)) & 3;
      to.codes[i] = (right(bytes32(low), i % 4 / 2 * 4) & 15) | left(high, 4);
    }
  }
};
struct IQ4_XS : Of256 {
  static constexpr int BYTES = 136, BITS = 8, MIN = BIAS8;
  static constexpr bool LOOKED_UP = true;
  static void unpack(const uint8_t* p, Span& to) {
    to.unit[0] = word(p);
    const uint32_t high = word(p + 2), low = dword(p + 4);
    for (int i = 0; i < 8; i++) {
      to.small[0][0][i] = ((low >> 4 * i & 15) | (high >> 2 * i & 3) << 4) - 32;
      to.codes[i] = nibbles(p + 8 + 16 * i);
    }
  }
};

// The numbers that the codes of IQ4_NL and IQ4_XS stand for.
alignas(16) static const int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                              1, 13, 25, 38, 53, 69, 89, 113};

// Numbered as in cpu.py, from FIRST_BLOCKS on.
typedef std::tuple<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS> Blocks;

// f(type) for the type of this number.
template <class F, class... T> static inline void with_one(int number, F f, std::tuple<T...>*) {
  (void)((number-- == 0 && (f(T()), true)) || ...);
}
template <class F> static inline void with_blocks(int format, F f) {
  with_one(format - FIRST_BLOCKS, f, (Blocks*)nullptr);
}

template <class T> constexpr int SPAN_BYTES = SPAN / T::WEIGHTS * T::BYTES;

// The span at p of a row that has n_groups from there on.
template <class T> static void unpack_span(const uint8_t* p, int n_groups, Span& to) {
  uint8_t rest[SPAN_BYTES<T>];
  if (T::WEIGHTS < SPAN && n_groups < LANES) {
    std::memset(rest, 0, sizeof rest);
    std::memcpy(rest, p, n_groups * T::BYTES), p = rest;
  }
  T::unpack(p, to);
}

static inline float from_float16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  union { uint32_t bits; float x; } u{(uint32_t)(h & 0x7FFF) << 13};
  u.x *= 0x1p112f, u.bits |= (uint32_t)(h & 0x8000) << 16;
  return u.x;
#endif
}

// One row of weights as numbers.
template <class T> static void row_of_blocks(const uint8_t* row, int n, float* to) {
  constexpr int PART = T::HALVES ? GROUP / 2 : GROUP;  // weights that share a scale
  for (int k = 0; k < n; k += SPAN, row += SPAN_BYTES<T>) {
    Span span;
    unpack_span<T>(row, (n - k) / GROUP, span);
    const uint8_t* codes = (const uint8_t*)span.codes;
    for (int i = 0; i < std::min(SPAN, n - k); i += PART) {
      const int half = i / PART % (GROUP / PART), lane = i / GROUP;
      auto number = [&](int which) {
        return T::WEIGHTS == GROUP ? from_float16(span.number[which][lane])
                                   : span.small[which][half][lane] * from_float16(span.unit[which]);
      };
      const float scale = number(0), min = (T::OWN_MIN ? number(1) : scale) * T::MIN;
      for (int j = i; j < i + PART; j += W) {
        vf code;
        for (int v = 0; v < W; v++) {
          const uint8_t c = codes[j + v];
          code[v] = T::LOOKED_UP ? VALUES[c] + BIAS8 : T::BITS == 8 && !BIAS8 ? (int8_t)c : c;
        }
        store(to + k + j, code * scale - splat(min));
      }
    }
  }
}

// ---- panels -----------------------------------------------------------------------------------

// Bits of the codes of four weights as they lie in a vector of int32, by planes: halves of a byte for
// two fours, then pairs of bits for four of them, then single bits for eight, then whole bytes.
template <class T> struct Planes {
  static constexpr int STORED = T::LOOKED_UP ? 4 : T::BITS;
  static constexpr int FOURS = STORED & 4 ? 4 : 0, PAIRS_OF_BITS = STORED & 2 ? 2 : 0;
  static constexpr int ONES = STORED & 1, BYTES = STORED == 8 ? 8 : 0;
  static constexpr int ROWS = FOURS + PAIRS_OF_BITS + ONES + BYTES;  // of int32[COLS]
  static constexpr int LOW_BITS = FOURS ? 4 : PAIRS_OF_BITS ? 2 : 0;  // below those of the next plane
  static constexpr int N = T::HALVES ? 2 : 1, KINDS = T::OWN_MIN ? 2 : 1;
  static constexpr int NUMBER = T::WEIGHTS == GROUP ? 2 : 1;  // bytes of a scale
  static constexpr int RECORD = ROWS * 4 * COLS + KINDS * N * NUMBER * COLS;  // bytes of a group
  static constexpr int UNITS = T::WEIGHTS == GROUP ? 0 : KINDS * 2 * COLS;    // of a span
};

template <class T> static size_t panel_of_blocks(int n_groups) {
  return (size_t)n_groups * Planes<T>::RECORD + (size_t)spans_of(n_groups) * Planes<T>::UNITS;
}

// n_rows <= 32 of blocks -> a panel.
template <class T>
static void pack_blocks(const uint8_t* w, size_t row_bytes, int n_rows, int n_groups, uint8_t* to) {
  typedef Planes<T> P;
  for (int chunk = 0; chunk < n_groups; chunk += CHUNK * LANES) {
    const int n = std::min(n_groups - chunk, CHUNK * LANES), n_spans = spans_of(n);
    uint8_t* records = to + n_spans * P::UNITS;
    for (int r = 0; r < COLS; r++) {  // the last panel repeats its last row, for results not used
      const uint8_t* p = w + std::min(r, n_rows - 1) * row_bytes + chunk / LANES * SPAN_BYTES<T>;
      for (int s = 0; s < n_spans; s++, p += SPAN_BYTES<T>) {
        Span span;
        unpack_span<T>(p, n - s * LANES, span);
        if constexpr (P::UNITS > 0)
          for (int i = 0; i < P::KINDS; i++) ((uint16_t*)(to + s * P::UNITS))[i * COLS + r] = span.unit[i];
        for (int lane = 0, before = 0; lane < LANES && s * LANES + lane < n; lane++) {
          // Groups `lane` of earlier spans, and all groups of earlier lanes, lie before.
          uint8_t* record = records + (size_t)(before + s) * P::RECORD;
          before += (n - lane + LANES - 1) / LANES;
          uint32_t* plane = (uint32_t*)record + r;
          uint32_t quad[8];
          std::memcpy(quad, &span.codes[lane], sizeof quad);
          if constexpr (P::FOURS > 0)
            for (int i = 0; i < 8; i += 2, plane += COLS) {
              const uint64_t two = word<uint64_t>((const uint8_t*)(quad + i)) & 0x0F0F0F0F0F0F0F0F;
              *plane = (uint32_t)(two | two >> 28);
            }
          constexpr int PAIR = P::FOURS ? 4 : 0;
          if constexpr (P::PAIRS_OF_BITS > 0)
            for (int i = 0; i < 8; i += 4, plane += COLS) {
              *plane = 0;
              for (int j = 0; j < 4; j++) *plane |= (quad[i + j] >> PAIR & 0x03030303) << 2 * j;
            }
          if constexpr (P::ONES > 0) {
            *plane = 0;
            for (int j = 0; j < 8; j++) *plane |= (quad[j] >> P::LOW_BITS & 0x01010101) << j;
          }
          if constexpr (P::BYTES > 0)
            for (int i = 0; i < 8; i++, plane += COLS) *plane = quad[i];
          uint8_t* numbers = record + P::ROWS * 4 * COLS;
          for (int i = 0; i < P::KINDS; i++)
            for (int half = 0; half < P::N; half++, numbers += P::NUMBER * COLS)
              if constexpr (P::NUMBER == 2) ((uint16_t*)numbers)[r] = span.number[i][lane];
              else ((int8_t*)numbers)[r] = span.small[i][half][lane];
        }
      }
    }
    to = records + (size_t)n * P::RECORD;
  }
}

// W small numbers, and W float16 ones. GCC 12 would convert the first one by one.
static INLINE vf small_numbers(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  vf y;
#if defined(__AVX2__)
  for (int i = 0; i < W; i += 8)
    ((f8x*)&y)[i / 8] = (f8x)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + i))));
#else
  for (int i = 0; i < W; i++) y[i] = p[i];
#endif
  return y;
#endif
}
static INLINE vf float16_numbers(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  vf y;
#if defined(__F16C__)
  for (int i = 0; i < W; i += 8) ((f8x*)&y)[i / 8] = (f8x)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i)));
#else
  for (int i = 0; i < W; i++) y[i] = from_float16(p[i]);
#endif
  return y;
#endif
}

static INLINE vi looked_up(vi codes) {
#if defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)VALUES));
  return (vi)_mm512_shuffle_epi8(table, (__m512i)codes) ^ (int)(0x01010101u * BIAS8);
#else
  union Parts { vi whole; b32 half[(sizeof(vi) + 31) / 32]; uint8_t byte[sizeof(vi)]; } x{codes};
#if defined(__AVX2__)
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)VALUES));
  for (b32& half : x.half) half = (b32)_mm256_shuffle_epi8(table, (__m256i)half);
#elif defined(__aarch64__)
  for (size_t i = 0; i < sizeof(vi); i += 16)
    vst1q_u8(x.byte + i, vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(VALUES)), vld1q_u8(x.byte + i)));
#else
  for (uint8_t& byte : x.byte) byte = VALUES[byte];
#endif
  return x.whole ^ (int)(0x01010101u * BIAS8);
#endif
}

// The codes of the four weights q of W rows.
template <class T> static INLINE vi quad(const int32_t* plane, int q) {
  typedef Planes<T> P;
  vi code = {};
  if constexpr (P::BYTES > 0) return load(plane + q * COLS);
  if constexpr (P::FOURS > 0) {
    code = load(plane + q / 2 * COLS), plane += P::FOURS * COLS;
    code = (q % 2 ? code >> 4 : code) & 0x0F0F0F0F;
  }
  // Bits at `from` of each byte come to `to`.
  auto moved = [](vi x, int from, int to) { return from > to ? x >> (from - to) : x << (to - from); };
  constexpr int PAIR = P::FOURS ? 4 : 0;
  if constexpr (P::PAIRS_OF_BITS > 0) {
    code |= moved(load(plane + q / 4 * COLS), q % 4 * 2, PAIR) & (0x03030303 << PAIR);
    plane += P::PAIRS_OF_BITS * COLS;
  }
  if constexpr (P::ONES > 0) code |= moved(load(plane), q, P::LOW_BITS) & (0x01010101 << P::LOW_BITS);
  if constexpr (T::LOOKED_UP) code = looked_up(code);
  return code;
}

// sums (M, VN vectors) of the products of QUADS times four codes, from q0 on, with four inputs each.
template <class T, int QUADS, int M, int VN>
static INLINE void products(const int32_t* planes, int q0, const int8_t* x, size_t x_stride,
                            vi sums[M][VN]) {
  auto input = [&](int m, int q) { return splat(word<int32_t>((const uint8_t*)x + m * x_stride + 4 * q)); };
#if defined(PAIRS)
  constexpr int STEP = std::min(QUADS, BEFORE_WIDENING<T::BITS>);
#pragma GCC unroll 8
  for (int from = 0; from < QUADS; from += STEP) {
    __m256i part[M][VN];
#pragma GCC unroll 8
    for (int i = from; i < from + STEP; i++) {
      __m256i b[VN];
      for (int v = 0; v < VN; v++) b[v] = (__m256i)quad<T>(planes + v * W, q0 + i);
      for (int m = 0; m < M; m++) {
        __m256i a = (__m256i)input(m, q0 + i);
        for (int v = 0; v < VN; v++) {
          __m256i p = pairs<T::BITS>(b[v], a);
          part[m][v] = i == from ? p : _mm256_add_epi16(part[m][v], p);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VN; v++)
        sums[m][v] = from ? sums[m][v] + (vi)widened(part[m][v]) : (vi)widened(part[m][v]);
  }
#else
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VN; v++) sums[m][v] = (vi){};
#pragma GCC unroll 8
  for (int i = 0; i < QUADS; i++) {
    vi b[VN];
    for (int v = 0; v < VN; v++) b[v] = quad<T>(planes + v * W, q0 + i);
    for (int m = 0; m < M; m++) {
      vi a = input(m, q0 + i);
      for (int v = 0; v < VN; v++) sums[m][v] = dot4(sums[m][v], b[v], a);
    }
  }
#endif
}

// y (M, W * VN) += tokens x (M, chunks, 8) times VN vectors of rows of a chunk of a panel.
template <class T, int M, int VN>
static void tile_of(const uint8_t* chunk, int v0, int n_groups, const Input* x, size_t x_stride, float* y) {
  typedef Planes<T> P;
  constexpr int QUADS = GROUP / 4 / P::N;
  const uint8_t* record = chunk + spans_of(n_groups) * P::UNITS;
  for (int lane = 0; lane < std::min(LANES, n_groups); lane++) {
    vf total[M][VN] = {};
    for (int s = 0; s * LANES + lane < n_groups; s++, record += P::RECORD) {
      for (int i = 0; i < P::RECORD; i += 64) __builtin_prefetch(record + AHEAD + i);
      const uint8_t* numbers = record + P::ROWS * 4 * COLS;
      auto number = [&](int kind, int half, int v) {
        const int at = (kind * P::N + half) * COLS + (v0 + v) * W;
        if constexpr (P::NUMBER == 2) return float16_numbers((const uint16_t*)numbers + at);
        else {
          const uint16_t* unit = (const uint16_t*)(chunk + s * P::UNITS) + kind * COLS + (v0 + v) * W;
          return small_numbers((const int8_t*)numbers + at) * float16_numbers(unit);
        }
      };
#pragma GCC unroll 2
      for (int half = 0; half < P::N; half++) {
        vi sums[M][VN];
        products<T, QUADS, M, VN>((const int32_t*)record + v0 * W, QUADS * half, x[lane].codes[s],
                                  x_stride * sizeof(Input), sums);
        vf scale[VN], min[VN];
        for (int v = 0; v < VN; v++) {
          scale[v] = number(0, half, v);
          min[v] = (T::OWN_MIN ? number(1, half, v) : scale[v]) * (float)T::MIN;
        }
        for (int m = 0; m < M; m++) {
          const Input& in = x[m * x_stride + lane];
          vf x_sum = splat(T::HALVES ? in.half_sum[half][s] : in.sum[s]), x_scale = splat(in.scale[s]);
          for (int v = 0; v < VN; v++)
            total[m][v] = term(total[m][v], to_float(sums[m][v]), scale[v], min[v], x_sum, x_scale);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VN; v++)
        store(y + m * COLS + v * W, load(y + m * COLS + v * W) + total[m][v]);
  }
}

// Tokens x (M, chunks, 8) times a panel -> y (M, 32).
template <class T>
static void multiply_blocks(const uint8_t* panel, int n_groups, const Input* x, int M, float* y) {
  typedef Planes<T> P;
  const size_t x_stride = inputs_of(n_groups);
  zero(y, M * COLS);
  for (int chunk = 0; chunk < n_groups; chunk += CHUNK * LANES) {
    const int n = std::min(n_groups - chunk, CHUNK * LANES);
    const Input* part = x + chunk / CHUNK;
    in_tiles<LOW>(M, [&](int m, auto height) {
      for (int v = 0; v < V; v += ACROSS<height>)
        tile_of<T, height, ACROSS<height>>(panel, v, n, part + m * x_stride, x_stride, y + m * COLS + v * W);
    });
    panel += (size_t)n * P::RECORD + spans_of(n) * P::UNITS;
  }
}
