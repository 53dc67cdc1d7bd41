// Products with weights as GGUF files hold them: rows of blocks of codes, read in place.
//
// In every type of block a weight is `scale * code - min`, where 32 or 16 weights share scale and
// min. Inputs are int8 codes that share a scale by 32. So the part of a product that one group
// contributes is
//     x_scale * (scale * sum(code * x) - min * sum(x)),
// where the first sum is of integers and exact, and the second is known once for a token.
//
// 256 weights of a row are a `Span`, unpacked alike for all types. Two loops take spans. `rows_in_place`
// multiplies each row of weights as soon as it is unpacked, for a token or two: it reads at the speed
// of memory. `tile_of` multiplies a `Tile` of 32 rows, unpacked and transposed once, by many tokens.
//
// Both add in the same order, so a token's result has the same bits in any batch. Along K, 8 spans
// are a chunk. Group i of each span of a chunk adds to sum i; the 8 sums of a chunk are added to the
// result from the first to the last. In a group of 32 that has two scales, the first 16 come first.
//
// Layouts: ggml-common.h and the dequantisation in the `gguf` package, which tests compare with.

#include <tuple>

constexpr int SPAN = 256, LANES = 8, CHUNK = 8;  // weights and groups of a span, spans of a chunk
constexpr int FEW = 4;                           // tokens that `rows_in_place` takes
constexpr int LOW = 6;                           // tokens in a tile: sums and totals fit in registers
constexpr int AHEAD = 1024;                      // bytes that it fetches ahead

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

// 32 codes times 32 inputs, added by fours.
template <int BITS> static inline i8x dot32(b32 w, const int8_t* x) {
  i8x inputs = *(const i8x_any*)x;
#if defined(PAIRS)
  return widened(pairs<BITS>((__m256i)w, (__m256i)inputs));
#else
  return dot4((i8x){}, (i8x)w, inputs);
#endif
}

// Eight results of `dot32`: the sums of their lower and their upper 16 inputs.
template <int BITS> static inline void add_up(const i8x d[8], i8x& lower, i8x& upper) {
#if defined(__AVX2__)
  // [a0 .. a3 b0 .. b3] in 16 bits, where sums of four products of up to 6 bits still fit, and of
  // eight of up to 5: two instructions where an addition of neighbours takes three or four.
  const __m256i one = _mm256_set1_epi16(1);
  auto packed = [&](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_packs_epi32(a, b), one); };
  auto first = [&](__m256i a, __m256i b) {
    if constexpr (BITS <= 6) return packed(a, b);
    else return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  auto second = [&](__m256i a, __m256i b) {
    if constexpr (BITS <= 5) return packed(a, b);
    if constexpr (BITS == 8) return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    __m256i even = (__m256i)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
    return _mm256_add_epi32(even, (__m256i)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD));
  };
  __m256i four[2];
  for (int i = 0; i < 2; i++) {
    const __m256i* x = (const __m256i*)d + 4 * i;
    four[i] = second(first(x[0], x[1]), first(x[2], x[3]));
  }
  lower = (i8x)_mm256_permute2x128_si256(four[0], four[1], 0x20);
  upper = (i8x)_mm256_permute2x128_si256(four[0], four[1], 0x31);
#else
  for (int i = 0; i < 8; i++) {
    lower[i] = d[i][0] + d[i][1] + d[i][2] + d[i][3];
    upper[i] = d[i][4] + d[i][5] + d[i][6] + d[i][7];
  }
#endif
}

// ---- inputs -----------------------------------------------------------------------------------

struct Input {  // 256 inputs of a token; what lies beyond the last one is zero
  alignas(64) int8_t codes[SPAN];
  float scale[LANES], sum[LANES];  // by group: the codes' scale and sum
  float half_sum[2][LANES];        // of the first and the second 16
};

static void round_inputs(const float* x, int n, Input* to) {
  for (int at = 0; at < n; at += SPAN, to++)
    for (int lane = 0; lane < LANES; lane++) {
      alignas(64) float part[GROUP] = {};  // rows are whole groups, but not whole spans
      if (const int k = at + GROUP * lane; k < n)
        for (int i = 0; i < GROUP; i += W) store(part + i, load(x + k + i));
      vf most = splat(1e-12f);
      for (int i = 0; i < GROUP; i += W) most = larger(most, magnitude(load(part + i)));
      const float step = largest(most) / 127.f;
      typedef int8_t narrow __attribute__((vector_size(W), aligned(1), may_alias));
      const vf magic = splat(12582912.f);
      int32_t sums[2] = {};
      for (int i = 0; i < GROUP; i += W) {
        vi code = __builtin_convertvector((load(part + i) / step + magic) - magic, vi);
        *(narrow*)(to->codes + GROUP * lane + i) = __builtin_convertvector(code, narrow);
        for (int j = 0; j < W; j++) sums[(i + j) / 16] += code[j];
      }
      to->scale[lane] = step, to->sum[lane] = sums[0] + sums[1];
      to->half_sum[0][lane] = sums[0], to->half_sum[1][lane] = sums[1];
    }
}

// ---- blocks -----------------------------------------------------------------------------------

struct Span {  // of one row
  b32 codes[LANES];
  f8x scale[2], min[2];  // by group; [1] are those of the second 16, where they have their own
};

static inline b32 bytes32(const void* p) { return *(const b32_any*)p; }
static inline b32 right(b32 x, int bits) { return (b32)((s16)x >> bits); }  // into the next byte, too:
static inline b32 left(b32 x, int bits) { return (b32)((s16)x << bits); }   // mask what comes out
static inline uint16_t word(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}
static inline uint32_t dword(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Eight bytes as numbers, the lowest first.
static inline f8x unsigned8(uint64_t x) {
#if defined(__AVX2__)
  return (f8x)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x)));
#else
  f8x y;
  for (int i = 0; i < 8; i++) y[i] = (float)(x >> 8 * i & 255);
  return y;
#endif
}

static inline f8x from_float16(const uint16_t* h) {
#if defined(__F16C__)
  return (f8x)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)h));
#else
  i8x bits;
  for (int i = 0; i < 8; i++) bits[i] = h[i];
  return (f8x)((i8x)((f8x)((bits & 0x7FFF) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
#endif
}
static inline float from_float16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint16_t one[8] = {h};
  return from_float16(one)[0];
#endif
}

// 16 bytes: their lower halves, then their upper halves.
static inline b32 nibbles(const uint8_t* p) {
#if defined(__AVX2__)
  __m128i x = _mm_loadu_si128((const __m128i*)p);
  __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1);
  return (b32)both & 15;
#else
  b32 y;
  for (int i = 0; i < 16; i++) y[i] = p[i] & 15, y[16 + i] = p[i] >> 4;
  return y;
#endif
}

// Bit i of x as byte i, 0 or 16.
static inline b32 fifth_bits(uint32_t x) {
#if defined(__AVX2__)
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
  __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(x), byte), bit);
  return (b32)_mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16));
#else
  b32 y;
  for (int i = 0; i < 32; i++) y[i] = (x >> i & 1) << 4;
  return y;
#endif
}

// The numbers that the codes of IQ4_NL and IQ4_XS stand for.
static inline b32 looked_up(b32 codes) {
  alignas(16) static const int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                1, 13, 25, 38, 53, 69, 89, 113};
#if defined(__AVX2__)
  __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)VALUES));
  return (b32)_mm256_shuffle_epi8(table, (__m256i)codes) ^ (uint8_t)BIAS8;
#elif defined(__aarch64__)
  union Two { b32 whole; uint8x16_t half[2]; } x{codes};
  for (int i = 0; i < 2; i++) x.half[i] = vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(VALUES)), x.half[i]);
  return x.whole ^ (uint8_t)BIAS8;
#else
  for (int i = 0; i < 32; i++) codes[i] = VALUES[codes[i]] ^ BIAS8;
  return codes;
#endif
}

// The scales and minima of Q4_K and Q5_K, of six bits each, times the block's own.
static inline void six_bits(const uint8_t* p, f8x& scale, f8x& min) {
#if defined(__AVX2__)
  const __m128i x = _mm_loadu_si128((const __m128i*)p);  // d and dmin, and three times four bytes: a b c
  const __m128i low_mask = _mm_setr_epi32(0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F);
  __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(x, _MM_SHUFFLE(3, 2, 3, 1)),
                               _mm_setr_epi32(0, 0, 0, 4));  // a c b c
  __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(x, _MM_SHUFFLE(2, 2, 1, 1)), 2);  // a a b b
  high = _mm_and_si128(high, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030));
  const __m128i both = _mm_or_si128(_mm_and_si128(low, low_mask), high);
  const __m128 d = _mm_cvtph_ps(x);
  scale = (f8x)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both)) * (f8x)_mm256_broadcastss_ps(d);
  min = (f8x)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(both, both)));
  min *= (f8x)_mm256_broadcastss_ps(_mm_movehdup_ps(d));
#else
  uint32_t a = dword(p + 4), b = dword(p + 8), c = dword(p + 12);
  uint32_t upper_scales = (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030);
  uint32_t upper_mins = (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030);
  scale = unsigned8((a & 0x3F3F3F3F) | (uint64_t)upper_scales << 32) * from_float16(word(p));
  min = unsigned8((b & 0x3F3F3F3F) | (uint64_t)upper_mins << 32) * from_float16(word(p + 2));
#endif
}

// Every second byte of 16, beginning with the first or the second.
static inline uint64_t every_second(const uint8_t* p, int first) {
  uint64_t x = 0;
  for (int i = 0; i < 8; i++) x |= (uint64_t)p[2 * i + first] << 8 * i;
  return x;
}

// A type of block: how many weights in how many bytes, bits of a code, whether 16 weights share a
// scale (else 32), and how 256 weights become a span. Bytes that are zero must give scale and min zero.
struct Of32 {
  static constexpr int WEIGHTS = 32;
  static constexpr bool HALVES = false;
  // Float16 numbers at the same place of eight blocks.
  static INLINE f8x numbers(const uint8_t* p, int bytes) {
    auto at = [&](int i) { return (short)word(p + i * bytes); };
#if defined(__F16C__)  // in registers: what was written in small pieces is read back late
    return (f8x)_mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
#else
    uint16_t x[8];
    for (int i = 0; i < 8; i++) x[i] = at(i);
    return from_float16(x);
#endif
  }
};
struct Of256 {
  static constexpr int WEIGHTS = 256;
  static constexpr bool HALVES = false;
};

struct Q4_0 : Of32 {
  static constexpr int BYTES = 18, BITS = 4;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = to.scale[0] * 8.f;
    for (int i = 0; i < 8; i++) to.codes[i] = nibbles(p + i * BYTES + 2);
  }
};
struct Q4_1 : Of32 {
  static constexpr int BYTES = 20, BITS = 4;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = -numbers(p + 2, BYTES);
    for (int i = 0; i < 8; i++) to.codes[i] = nibbles(p + i * BYTES + 4);
  }
};
struct Q5_0 : Of32 {
  static constexpr int BYTES = 22, BITS = 5;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = to.scale[0] * 16.f;
    for (int i = 0; i < 8; i++, p += BYTES) to.codes[i] = nibbles(p + 6) | fifth_bits(dword(p + 2));
  }
};
struct Q5_1 : Of32 {
  static constexpr int BYTES = 24, BITS = 5;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = -numbers(p + 2, BYTES);
    for (int i = 0; i < 8; i++, p += BYTES) to.codes[i] = nibbles(p + 8) | fifth_bits(dword(p + 4));
  }
};
struct Q8_0 : Of32 {
  static constexpr int BYTES = 34, BITS = 8;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = to.scale[0] * (float)BIAS8;
    for (int i = 0; i < 8; i++) to.codes[i] = bytes32(p + i * BYTES + 2) ^ (uint8_t)BIAS8;
  }
};
struct IQ4_NL : Of32 {
  static constexpr int BYTES = 18, BITS = 8;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    to.scale[0] = numbers(p, BYTES), to.min[0] = to.scale[0] * (float)BIAS8;
    for (int i = 0; i < 8; i++) to.codes[i] = looked_up(nibbles(p + i * BYTES + 2));
  }
};

struct Q2_K : Of256 {
  static constexpr int BYTES = 84, BITS = 2;
  static constexpr bool HALVES = true;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    float d = from_float16(word(p + 80)), dmin = from_float16(word(p + 82));
    for (int half = 0; half < 2; half++) {
      uint64_t x = every_second(p, half), low = 0x0F0F0F0F0F0F0F0F;
      to.scale[half] = unsigned8(x & low) * d, to.min[half] = unsigned8(x >> 4 & low) * dmin;
    }
    for (int i = 0; i < 8; i++) to.codes[i] = right(bytes32(p + 16 + i / 4 * 32), 2 * (i % 4)) & 3;
  }
};
struct Q3_K : Of256 {
  static constexpr int BYTES = 110, BITS = 3;
  static constexpr bool HALVES = true;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    uint32_t a = dword(p + 96), b = dword(p + 100), c = dword(p + 104);
    uint32_t scales[4] = {
      (a & 0x0F0F0F0F) | (c << 4 & 0x30303030), (b & 0x0F0F0F0F) | (c << 2 & 0x30303030),
      (a >> 4 & 0x0F0F0F0F) | (c & 0x30303030), (b >> 4 & 0x0F0F0F0F) | (c >> 2 & 0x30303030),
    };
    float d = from_float16(word(p + 108));
    for (int half = 0; half < 2; half++) {
      to.scale[half] = (unsigned8(every_second((const uint8_t*)scales, half)) - 32.f) * d;
      to.min[half] = to.scale[half] * 4.f;
    }
    b32 high = bytes32(p);
    for (int i = 0; i < 8; i++) {
      b32 low = right(bytes32(p + 32 + i / 4 * 32), 2 * (i % 4)) & 3;
      to.codes[i] = low | left(right(high, i) & 1, 2);
    }
  }
};
struct Q4_K : Of256 {
  static constexpr int BYTES = 144, BITS = 4;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    six_bits(p, to.scale[0], to.min[0]);
    for (int i = 0; i < 8; i += 2) {
      b32 x = bytes32(p + 16 + 16 * i);
      to.codes[i] = x & 15, to.codes[i + 1] = right(x, 4) & 15;
    }
  }
};
struct Q5_K : Of256 {
  static constexpr int BYTES = 176, BITS = 5;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    six_bits(p, to.scale[0], to.min[0]);
    b32 high = bytes32(p + 16);
    for (int i = 0; i < 8; i += 2) {
      b32 x = bytes32(p + 48 + 16 * i);
      to.codes[i] = (x & 15) | left(right(high, i) & 1, 4);
      to.codes[i + 1] = (right(x, 4) & 15) | left(right(high, i + 1) & 1, 4);
    }
  }
};
struct Q6_K : Of256 {
  static constexpr int BYTES = 210, BITS = 6;
  static constexpr bool HALVES = true;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    float d = from_float16(word(p + 208));
    for (int half = 0; half < 2; half++) {  // signed bytes: the sign flipped, 128 more
      to.scale[half] = (unsigned8(every_second(p + 192, half) ^ 0x8080808080808080) - 128.f) * d;
      to.min[half] = to.scale[half] * 32.f;
    }
    for (int i = 0; i < 8; i++) {
      const uint8_t* low = p + i / 4 * 64 + i % 2 * 32;
      b32 high = right(bytes32(p + 128 + i / 4 * 32), 2 * (i % 4)) & 3;
      to.codes[i] = (right(bytes32(low), i % 4 / 2 * 4) & 15) | left(high, 4);
    }
  }
};
struct IQ4_XS : Of256 {
  static constexpr int BYTES = 136, BITS = 8;
  static INLINE void unpack(const uint8_t* p, Span& to) {
    float d = from_float16(word(p));
    uint32_t high = word(p + 2), low = dword(p + 4);
    uint64_t scales = 0;
    for (int i = 0; i < 8; i++)
      scales |= (uint64_t)((low >> 4 * i & 15) | (high >> 2 * i & 3) << 4) << 8 * i;
    to.scale[0] = (unsigned8(scales) - 32.f) * d, to.min[0] = to.scale[0] * (float)BIAS8;
    for (int i = 0; i < 8; i++) to.codes[i] = looked_up(nibbles(p + 8 + 16 * i));
  }
};

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
template <class T> static INLINE void unpack_span(const uint8_t* p, int n_groups, Span& to) {
  uint8_t rest[SPAN_BYTES<T>];
  if (T::WEIGHTS < SPAN && n_groups < LANES) {
    std::memset(rest, 0, sizeof rest);
    std::memcpy(rest, p, n_groups * T::BYTES), p = rest;
  }
  T::unpack(p, to);
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
      const float scale = span.scale[half][lane], min = span.min[half][lane];
      for (int j = i; j < i + PART; j += W) {
        vf code;
        for (int v = 0; v < W; v++)
          code[v] = T::BITS == 8 && !BIAS8 ? (int8_t)codes[j + v] : codes[j + v];
        store(to + k + j, code * scale - splat(min));
      }
    }
  }
}

// ---- products, row by row ------------------------------------------------------------------------

// Tokens x (M, n_spans), x_stride apart, times n_rows of weights -> y (M, n_rows), COLS apart.
template <class T, int M>
static void rows_in_place(const uint8_t* w, size_t row_bytes, int n_rows, int n_groups,
                          const Input* x, size_t x_stride, float* y) {
  for (int r = 0; r < n_rows; r++, w += row_bytes) {
    float result[M] = {};
    const uint8_t* p = w;
    const Input* inputs = x;
    for (int left = n_groups; left > 0;) {
      f8x total[M] = {};
      for (int s = 0; s < CHUNK && left > 0; s++, left -= LANES, p += SPAN_BYTES<T>, inputs++) {
        for (int i = 0; i < SPAN_BYTES<T>; i += 64) __builtin_prefetch(p + AHEAD + i);
        Span span;
        unpack_span<T>(p, left, span);
        for (int m = 0; m < M; m++) {
          const Input& in = inputs[m * x_stride];
          i8x products[8], lower, upper;
          for (int i = 0; i < 8; i++) products[i] = dot32<T::BITS>(span.codes[i], in.codes + GROUP * i);
          add_up<T::BITS>(products, lower, upper);
          auto add = [&](i8x sums, int half, const float* x_sum) {
            total[m] = term(total[m], __builtin_convertvector(sums, f8x), span.scale[half],
                            span.min[half], *(const f8x_any*)x_sum, *(const f8x_any*)in.scale);
          };
          if constexpr (T::HALVES) add(lower, 0, in.half_sum[0]), add(upper, 1, in.half_sum[1]);
          else add(lower + upper, 0, in.sum);
        }
      }
      for (int m = 0; m < M; m++)
        for (int lane = 0; lane < LANES; lane++) result[m] += total[m][lane];
    }
    for (int m = 0; m < M; m++) y[m * COLS + r] = result[m];
  }
}

// ---- products, tile by tile -----------------------------------------------------------------------

struct Tile {  // a chunk of 32 rows of weights: fours of codes, and scales and minima by group
  alignas(64) int32_t codes[CHUNK][SPAN / 4][COLS];
  float scale[CHUNK][2 * LANES][COLS], min[CHUNK][2 * LANES][COLS];
};

template <class T>
static void fill(const uint8_t* w, size_t row_bytes, int n_rows, int chunk, int n_groups, Tile& to) {
  // The next chunk is fetched meanwhile, into the second-level cache: of these rows, or of the next.
  const int end = std::min(n_groups, chunk + CHUNK * LANES);
  const size_t ahead = end < n_groups ? CHUNK * SPAN_BYTES<T>
                                      : COLS * row_bytes - chunk / LANES * SPAN_BYTES<T>;
  for (int r0 = 0; r0 < COLS; r0 += 8)
    for (int g = chunk; g < end; g += LANES) {
      Span spans[8];
      const float *codes[8], *scale[8], *min[8];
      for (int j = 0; j < 8; j++) {  // the last panel repeats its last row, for results that are not used
        const uint8_t* p = w + std::min(r0 + j, n_rows - 1) * row_bytes + g / LANES * SPAN_BYTES<T>;
        for (int i = 0; i < SPAN_BYTES<T>; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);
        unpack_span<T>(p, n_groups - g, spans[j]);
        codes[j] = (const float*)spans[j].codes;
        scale[j] = (const float*)spans[j].scale, min[j] = (const float*)spans[j].min;
      }
      const int s = (g - chunk) / LANES, n = T::HALVES ? 2 * LANES : LANES;
      transpose8(codes, SPAN / 4, (float*)to.codes[s][0] + r0);
      transpose8(scale, n, to.scale[s][0] + r0), transpose8(min, n, to.min[s][0] + r0);
    }
}

// sums (M, VN vectors) of QUADS times four products; x points to the inputs of the first token.
template <int BITS, int QUADS, int M, int VN>
static inline void products(const int32_t* w, const int8_t* x, size_t x_stride, vi sums[M][VN]) {
  auto input = [&](int m, int q) {
    int32_t four;
    std::memcpy(&four, x + m * x_stride + 4 * q, 4);
    return splat(four);
  };
#if defined(PAIRS)
  constexpr int STEP = std::min(QUADS, BEFORE_WIDENING<BITS>);
#pragma GCC unroll 8
  for (int q0 = 0; q0 < QUADS; q0 += STEP) {
    __m256i part[M][VN];
#pragma GCC unroll 8
    for (int q = q0; q < q0 + STEP; q++) {
      __m256i b[VN];
      for (int v = 0; v < VN; v++) b[v] = (__m256i)load(w + q * COLS + v * W);
      for (int m = 0; m < M; m++) {
        __m256i a = (__m256i)input(m, q);
        for (int v = 0; v < VN; v++) {
          __m256i p = pairs<BITS>(b[v], a);
          part[m][v] = q == q0 ? p : _mm256_add_epi16(part[m][v], p);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VN; v++)
        sums[m][v] = q0 ? sums[m][v] + (vi)widened(part[m][v]) : (vi)widened(part[m][v]);
  }
#else
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VN; v++) sums[m][v] = (vi){};
#pragma GCC unroll 8
  for (int q = 0; q < QUADS; q++) {
    vi b[VN];
    for (int v = 0; v < VN; v++) b[v] = load(w + q * COLS + v * W);
    for (int m = 0; m < M; m++) {
      vi a = input(m, q);
      for (int v = 0; v < VN; v++) sums[m][v] = dot4(sums[m][v], b[v], a);
    }
  }
#endif
}

// y (M, W * VN) += tokens x (M, spans) times VN vectors of rows of a tile.
template <int BITS, bool HALVES, int M, int VN>
static inline void tile_of(const Tile& w, int v0, int n_groups, const Input* x, size_t x_stride, float* y) {
  constexpr int N = HALVES ? 2 : 1, QUADS = GROUP / 4 / N;
  for (int lane = 0; lane < std::min(LANES, n_groups); lane++) {
    vf total[M][VN] = {};
    for (int s = 0; s * LANES + lane < n_groups; s++)
#pragma GCC unroll 2
      for (int half = 0; half < N; half++) {
        const int quad = 8 * lane + QUADS * half;
        vi sums[M][VN];
        products<BITS, QUADS, M, VN>(w.codes[s][quad] + v0 * W, x[s].codes + 4 * quad,
                                     x_stride * sizeof(Input), sums);
        vf scale[VN], min[VN];
        for (int v = 0; v < VN; v++) {
          scale[v] = load(w.scale[s][LANES * half + lane] + (v0 + v) * W);
          min[v] = load(w.min[s][LANES * half + lane] + (v0 + v) * W);
        }
        for (int m = 0; m < M; m++) {
          const Input& in = x[m * x_stride + s];
          vf x_sum = splat(HALVES ? in.half_sum[half][lane] : in.sum[lane]), x_scale = splat(in.scale[lane]);
          for (int v = 0; v < VN; v++)
            total[m][v] = term(total[m][v], to_float(sums[m][v]), scale[v], min[v], x_sum, x_scale);
        }
      }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VN; v++)
        store(y + m * COLS + v * W, load(y + m * COLS + v * W) + total[m][v]);
  }
}

// Tokens x (M, spans) times n_rows <= 32 of weights -> y (M, 32).
template <class T>
static void multiply_blocks(const uint8_t* w, size_t row_bytes, int n_rows, int n_groups,
                            const Input* x, int M, float* y, Tile& tile) {
  const size_t x_stride = (n_groups + LANES - 1) / LANES;
  if (M <= FEW) {
    with_rows<FEW>(M, [&](auto m) {
      rows_in_place<T, m>(w, row_bytes, n_rows, n_groups, x, x_stride, y);
    });
    return;
  }
  // Types that are multiplied alike share one tile's code.
#if defined(PAIRS)
  constexpr int BITS = std::max(T::BITS, 4);
#else
  constexpr int BITS = 8;
#endif
  zero(y, M * COLS);
  for (int chunk = 0; chunk < n_groups; chunk += CHUNK * LANES) {
    fill<T>(w, row_bytes, n_rows, chunk, n_groups, tile);
    in_tiles<LOW>(M, [&](int m, auto n) {
      for (int v = 0; v < V; v += ACROSS<n>)
        tile_of<BITS, T::HALVES, n, ACROSS<n>>(
            tile, v, std::min(n_groups - chunk, CHUNK * LANES),
            x + m * x_stride + chunk / LANES, x_stride, y + m * COLS + v * W);
    });
  }
}
