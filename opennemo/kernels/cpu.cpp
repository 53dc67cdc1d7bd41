// One step of the decoder on a CPU: a ragged batch of tokens in, logits of the wanted rows out.
//
// The whole step is one call, because at one token a step a framework's time lies between its
// operators. Every product, attention's two included, is done by one of two tiles over panels of
// 32 columns: `tile` in float32, which all formats but int8 are unpacked for, and `tile8` in int8.
// Vectors are those of GCC and Clang, so the same text is AVX-512, AVX2, NEON or scalar code; only
// `dot` is written for each. The file is compiled for the machine it runs on (see cpu.py).
//
// A row's result never depends on what else is in the batch: each sum runs over its own terms in a
// fixed order, whatever the shape of the tile, and attention walks keys in tiles that are aligned
// to the beginning of the sequence. Tests check this bit for bit; keep it when you change a loop.
//
// Letters as in transformer.py: T tokens, D dim, N and K heads, H head_dim, F hidden_dim.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

// A test runs the AVX-512 code on any machine, with its one special instruction spelled out.
#if defined(EMULATE_VNNI) || (defined(__AVX512VNNI__) && defined(__AVX512BW__))
#define VNNI 1
constexpr int W = 16, TILE = 12, SUMS = 24;  // floats in a vector, most rows and sums in a tile
#elif defined(__AVX2__)
constexpr int W = 8, TILE = 6, SUMS = 8;
#else
constexpr int W = 4, TILE = 6, SUMS = 8;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef int32_t i8x_any __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f8x __attribute__((vector_size(32)));
typedef float f8x_any __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int COLS = 32;       // of a panel: output features of a weight matrix, or keys
constexpr int V = COLS / W;    // vectors across a panel
constexpr int BLOCK = 48;      // rows that share an unpacked panel
constexpr int TALL = 192;      // rows that share a tile of blocks, which takes longer to unpack
constexpr int DEPTH = 128;     // unpacked at a time: 16 KiB, half of a first-level cache
constexpr int GROUP = 32;      // int8 inputs that share a scale, int4 weights that share one

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline vi load(const int32_t* p) { return *(const vi_any*)p; }
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline vf splat(float x) { return x - (vf){}; }
static inline vi splat(int32_t x) { return x - (vi){}; }
static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline vf smaller(vf a, vf b) { return a < b ? a : b; }
static inline vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
static inline float sum(vf x) {
  float s = 0;
  for (int i = 0; i < W; i++) s += x[i];
  return s;
}
static inline float largest(vf x) {
  float s = x[0];
  for (int i = 1; i < W; i++) s = std::max(s, x[i]);
  return s;
}
// The compiler's memcpy and memset of a size it does not know take longer to begin than to copy.
static inline void copy(const float* from, int n, float* to) {
  int i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = from[i];
}
static inline void zero(float* to, int n) {
  int i = 0;
  for (; i + W <= n; i += W) store(to + i, (vf){});
  for (; i < n; i++) to[i] = 0;
}
static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// e^x to a few units in the last place; exactly 0 below -87, so that a masked key weighs nothing.
static inline vf exponential(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vf y = smaller(larger(x, splat(-87.f)), splat(88.f));
  vf n = (y * 1.44269504f + magic) - magic;
  vf r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  vf p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f, p = p * r + 8.3334519e-3f, p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f, p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  vf scaled = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
  return (vf)((vi)scaled & (x > splat(-87.f)));
}

// ---- tiles ------------------------------------------------------------------------------------

// y (M, W * VN) += x (M, K) w (K, W * VN), one addition after the other along K.
template <int M, int VN>
static inline void tile(const float* w, size_t w_stride, const float* x, size_t x_stride, int K,
                        float* y, size_t y_stride) {
  vf acc[M][VN];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VN; v++) acc[m][v] = load(y + m * y_stride + v * W);
  for (int k = 0; k < K; k++, w += w_stride) {
    vf b[VN];
    for (int v = 0; v < VN; v++) b[v] = load(w + v * W);
    for (int m = 0; m < M; m++) {
      vf a = splat(x[m * x_stride + k]);
      for (int v = 0; v < VN; v++) acc[m][v] += a * b[v];
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VN; v++) store(y + m * y_stride + v * W, acc[m][v]);
}

// Integer products: SIDE inputs of a feature lie side by side in a lane, whose products `dot` adds
// up. x holds the same SIDE inputs for all lanes.
#if defined(VNNI)
typedef int8_t Code;
constexpr int SIDE = 4, BIAS = 128;  // it takes unsigned weights; `tile8` subtracts the excess
static inline vi lanes(const uint8_t* w) { return load((const int32_t*)w); }
static inline vi dot(vi acc, vi w, int32_t x) {
#if defined(EMULATE_VNNI)
  for (int byte = 0; byte < 32; byte += 8) acc += (w >> byte & 255) * (int8_t)(x >> byte);
  return acc;
#else
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#endif
}
#else
// In 16 bits nothing can overflow. The product of bytes that AVX2 has saturates, and working around
// that with signs was a tenth slower (65 against 72 billion products a second on Zen 3).
typedef int16_t Code;
constexpr int SIDE = 2, BIAS = 0;
#if defined(__AVX2__)
static inline vi lanes(const uint8_t* w) {
  return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
}
static inline vi dot(vi acc, vi w, int32_t x) {
  return acc + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
}
#else
typedef int8_t bytes __attribute__((vector_size(2 * W), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * W)));
static inline vi lanes(const uint8_t* w) {
  return (vi)__builtin_convertvector(*(const bytes*)w, shorts);
}
static inline vi dot(vi acc, vi w, int32_t x) {
  return acc + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
}
#endif
#endif

typedef Code codes_any __attribute__((vector_size(W * sizeof(Code)), aligned(1), may_alias));

struct Codes {  // int8 inputs
  const Code* x;
  const float* scale;     // one a group
  const int32_t* excess;  // BIAS times the sum of a group
  int n_groups;
};

// The next panel is fetched while this one is computed, in equal parts by all passes over it: the
// first pass alone would wait for memory, and the others leave it idle.
struct Ahead {
  const uint8_t* line;
  int n_passes;
  static constexpr int LINES = GROUP * COLS / 64;  // of a group
  void fetch() {
    for (int i = 0; i < (LINES + n_passes - 1) / n_passes; i++, line += 64) __builtin_prefetch(line);
  }
};

// y (M, W * VN) = int8 x (M, groups of 32) times a panel, exact within a group.
template <int M, int VN>
static inline void tile8(const uint8_t* w, Codes in, float* y, size_t y_stride, Ahead& ahead) {
  const size_t x_stride = (size_t)in.n_groups * GROUP;
  vf total[M][VN] = {};
  for (int g = 0; g < in.n_groups; g++) {
    ahead.fetch();
    vi acc[M][VN];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VN; v++)
        acc[m][v] = BIAS ? splat(-in.excess[m * in.n_groups + g]) : (vi){};
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k += SIDE, w += SIDE * COLS) {
      vi b[VN];
      for (int v = 0; v < VN; v++) b[v] = lanes(w + v * W * SIDE);
      for (int m = 0; m < M; m++) {
        int32_t a;
        std::memcpy(&a, in.x + m * x_stride + g * GROUP + k, 4);
        for (int v = 0; v < VN; v++) acc[m][v] = dot(acc[m][v], b[v], a);
      }
    }
    for (int m = 0; m < M; m++) {
      vf scale = splat(in.scale[m * in.n_groups + g]);
      for (int v = 0; v < VN; v++) total[m][v] += to_float(acc[m][v]) * scale;
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VN; v++) store(y + m * y_stride + v * W, total[m][v]);
}

// Few rows take the panel in one pass, many in several, so that sums stay in registers.
template <int M> constexpr int ACROSS = M * V <= SUMS ? V : 2;

template <int M>
static void rows_of(const float* w, size_t w_stride, const float* x, size_t x_stride, int K,
                    float* y, size_t y_stride) {
  for (int v = 0; v < V; v += ACROSS<M>)
    tile<M, ACROSS<M>>(w + v * W, w_stride, x, x_stride, K, y + v * W, y_stride);
}
template <int M>
static void rows_of8(const uint8_t* w, Codes in, float* y, size_t y_stride, Ahead& ahead) {
  for (int v = 0; v < V; v += ACROSS<M>)
    tile8<M, ACROSS<M>>(w + v * W * SIDE, in, y + v * W, y_stride, ahead);
}

template <int M, class F> static inline void with_rows(int m, F f) {
  if (m == M) f(std::integral_constant<int, M>());
  else if constexpr (M > 1) with_rows<M - 1>(m, f);
}

// Cut rows into tiles of nearly equal height, as low ones are slow: 8 into 4 and 4, not 6 and 2.
template <int MOST = TILE, class F> static inline void in_tiles(int M, F f) {
  int n_tiles = (M + MOST - 1) / MOST;
  for (int m = 0; n_tiles; n_tiles--) {
    int height = (M - m + n_tiles - 1) / n_tiles;
    with_rows<MOST>(height, [&](auto n) { f(m, n); });
    m += height;
  }
}

// y (M, 32) += x (M, K) w (K, 32)
static void multiply(const float* w, size_t w_stride, const float* x, size_t x_stride, int M, int K,
                     float* y, size_t y_stride) {
  in_tiles(M, [&](int m, auto n) {
    rows_of<n>(w, w_stride, x + m * x_stride, x_stride, K, y + m * y_stride, y_stride);
  });
}

// columns[h][j] = rows[j][h] of 8 rows of H numbers, columns being COLS apart
static void transpose8(const float* const* rows, int H, float* columns) {
  int h = 0;
#if defined(__AVX2__)
  for (; h + 8 <= H; h += 8) {
    __m256 a[8], b[8];
    for (int j = 0; j < 8; j++) a[j] = _mm256_loadu_ps(rows[j] + h);
    for (int j = 0; j < 8; j += 2) {
      b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]), b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
    }
    for (int j = 0; j < 8; j += 4)
      for (int i = 0; i < 2; i++) {
        a[j + 2 * i] = _mm256_shuffle_ps(b[j + i], b[j + 2 + i], 0x44);
        a[j + 2 * i + 1] = _mm256_shuffle_ps(b[j + i], b[j + 2 + i], 0xEE);
      }
    for (int i = 0; i < 4; i++) {
      _mm256_storeu_ps(columns + (h + i) * COLS, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
      _mm256_storeu_ps(columns + (h + 4 + i) * COLS, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
    }
  }
#endif
  for (; h < H; h++)
    for (int j = 0; j < 8; j++) columns[(size_t)h * COLS + j] = rows[j][h];
}

// ---- number formats ---------------------------------------------------------------------------

enum Format { FP32, BF16, FP8, INT8, INT4, FIRST_BLOCKS };  // numbered as in cpu.py

#include "blocks.h"
#include "scales.h"

static inline float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// Memory for weights, in chunks that the system can map by huge pages.
class Arena {
 public:
  ~Arena() {
    for (void* chunk : chunks_) std::free(chunk);
  }
  uint8_t* take(size_t bytes) {
    bytes = (bytes + 63) & ~(size_t)63;
    if (bytes > left_) {
      left_ = (std::max(bytes, (size_t)1 << 25) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
      next_ = (uint8_t*)std::aligned_alloc(ALIGNMENT, left_);
      if (!next_) std::abort();
      chunks_.push_back(next_);
#if defined(__linux__)
      madvise(next_, left_, MADV_HUGEPAGE);
#endif
    }
    left_ -= bytes;
    return (next_ += bytes) - bytes;
  }

 private:
  static constexpr size_t ALIGNMENT = 1 << 21;
  std::vector<void*> chunks_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

// Byte j of each lane. Sign, exponent and mantissa of E4M3 stand in float32's order; only the bias of
// the exponent differs.
static inline f8x from_fp8(i8x w, int j) {
  return (f8x)(w << (24 - 8 * j) >> 4 & (int32_t)0x87F00000) * 0x1p120f;
}

#if defined(__AVX512F__)
// By way of float16, whose bits stand in E4M3's order, too. What `from_fp8` multiplies may be a number
// below float32's normal ones, for each of which Intel's processors take some 150 cycles; a matrix of
// evenly spread codes was read at a tenth of the speed.
static inline vf from_halves(__m256i x) {  // a byte in the upper half of each 16 bits
  __m256i half = _mm256_and_si256(_mm256_srai_epi16(x, 1), _mm256_set1_epi16((short)0xBF80));
  return (vf)_mm512_cvtph_ps(half);
}
struct Unpacked {  // features 0, 16, 1, 17 to 7, 23, and the same plus 8; a 256th of their values
  vf even, odd;
  explicit Unpacked(const uint8_t* w) {
    __m256i bytes = _mm256_loadu_si256((const __m256i*)w);
    even = from_halves(_mm256_slli_epi16(bytes, 8)), odd = from_halves(bytes);
  }
};
static inline void store_in_order(vf even, vf odd, float* y) {
  const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i rest = _mm512_add_epi32(pick, _mm512_set1_epi32(1));
  store(y, (vf)_mm512_permutex2var_ps((__m512)even, pick, (__m512)odd) * 256.f);
  store(y + W, (vf)_mm512_permutex2var_ps((__m512)even, rest, (__m512)odd) * 256.f);
}
#endif

// As `multiply`, for so few rows that unpacking the panel to memory first would take longest.
template <int M>
static void multiply_fp8(const uint8_t* w, const float* x, size_t x_stride, int K, float* y) {
#if defined(__AVX512F__)
  vf even[M] = {}, odd[M] = {};
  auto add = [&](int k, vf* even, vf* odd) {
    Unpacked b(w + (size_t)k * COLS);
    for (int m = 0; m < M; m++) {
      vf a = splat(x[m * x_stride + k]);
      even[m] += a * b.even, odd[m] += a * b.odd;
    }
  };
  vf even2[M] = {}, odd2[M] = {};
  int k = 0;
  for (; k + 2 <= K; k += 2) {
    __builtin_prefetch(w + (size_t)(k + 64) * COLS);
    add(k, even, odd), add(k + 1, even2, odd2);
  }
  if (k < K) add(k, even, odd);
  for (int m = 0; m < M; m++) even[m] += even2[m], odd[m] += odd2[m];
  for (int m = 0; m < M; m++) store_in_order(even[m], odd[m], y + m * COLS);
#else
  f8x acc[M][4] = {};
  for (int k = 0; k < K; k++, w += COLS) {
    i8x bytes = *(const i8x_any*)w;
    for (int j = 0; j < 4; j++) {
      f8x b = from_fp8(bytes, j);
      for (int m = 0; m < M; m++) acc[m][j] += x[m * x_stride + k] * b;
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 4; j++) *(f8x_any*)(y + m * COLS + 8 * j) = acc[m][j];
#endif
}

// A weight matrix in panels of 32 output features, along the inputs (K):
//   fp32, bf16  [K][32]
//   int8        [K / SIDE][32][SIDE], as `dot` takes them
//   fp8         [K][8][4], and int4 [K / 2][8][4], two inputs a byte: byte j of the i-th group of
//               four is feature 8 * j + i, so that shifts alone unpack eight features at once
// Rows of blocks (blocks.h), and of the embedding, stay where they are, row_bytes apart.
struct Matrix {
  Format format = FP32;
  int rows = 0, cols = 0, panels = 0;
  bool power_of_two = false, whole_rows = false;  // how inputs find their scales
  float input_scale = 0;  // of fp8 inputs, if static
  size_t panel_bytes = 0, row_bytes = 0;
  uint8_t* data = nullptr;
  const uint8_t* stored = nullptr;
  std::vector<float> scale;  // fp8, int8: [rows]; int4: [panels][groups][32]

  bool in_blocks() const { return format >= FIRST_BLOCKS; }
  int depth() const { return padded(cols, format == INT8 || format == INT4 ? GROUP : 1); }
  const uint8_t* panel(int p) const { return data + p * panel_bytes; }

  void shape(Format f, int n_rows, int n_cols, Arena& arena) {
    format = f, rows = n_rows, cols = n_cols, panels = padded(n_rows, COLS) / COLS;
    if (in_blocks()) {
      with_blocks(f, [&](auto type) { panel_bytes = panel_of_blocks<decltype(type)>(cols / GROUP); });
      data = arena.take(panel_bytes * panels);
      return;
    }
    const size_t half_bytes[] = {8, 4, 2, 2, 1};
    panel_bytes = half_bytes[f] * depth() * COLS / 2;
    data = arena.take(panel_bytes * panels);
    size_t n_scales = f == INT4 ? (size_t)panels * depth() : panels * COLS;
    scale.assign(n_scales, f == FP32 || f == BF16 ? 1.f : 0.f);
    std::memset(data, f == INT8 ? BIAS : f == INT4 ? 0x88 : 0, panel_bytes * panels);
  }

  void refer(Format f, int n_rows, int n_cols, const uint8_t* codes, size_t bytes) {
    format = f, rows = n_rows, cols = n_cols, panels = padded(n_rows, COLS) / COLS;
    stored = codes, row_bytes = bytes;
  }

  // Put the rows of one panel, row_bytes apart as PyTorch holds them, in their places.
  void pack_panel(int p, const uint8_t* codes, size_t bytes, const float* row_scale, int scales_per_row) {
    const int first = p * COLS, end = std::min(rows, first + COLS);
    if (in_blocks()) {
      with_blocks(format, [&](auto type) {
        pack_blocks<decltype(type)>(codes + first * bytes, bytes, end - first, cols / GROUP,
                                    data + p * panel_bytes);
      });
    } else {
      for (int r = first; r < end; r++) pack(r, codes + r * bytes, row_scale + (size_t)r * scales_per_row);
    }
  }

  // Put one row of codes in its place.
  void pack(int row, const void* codes, const float* row_scale) {
    uint8_t* to = data + row / COLS * panel_bytes;
    int lane = row % COLS, byte = lane % 8 * 4 + lane / 8;
    const uint8_t* from = (const uint8_t*)codes;
    switch (format) {
      case FP32:
        for (int k = 0; k < cols; k++) ((float*)to)[k * COLS + lane] = ((const float*)from)[k];
        return;
      case BF16:
        for (int k = 0; k < cols; k++)
          ((uint16_t*)to)[k * COLS + lane] = ((const uint16_t*)from)[k];
        return;
      case FP8:
        for (int k = 0; k < cols; k++) to[k * COLS + byte] = from[k];
        break;
      case INT8:
        for (int k = 0; k < cols; k++) to[(k / SIDE * COLS + lane) * SIDE + k % SIDE] = from[k] ^ BIAS;
        break;
      case INT4:
        for (int k = 0; k < cols; k += 2) to[k / 2 * COLS + byte] = from[k / 2];
        for (int g = 0; g < depth() / GROUP; g++)
          scale[((size_t)row / COLS * depth() / GROUP + g) * COLS + lane] = row_scale[g];
        return;
      case FIRST_BLOCKS: return;
    }
    scale[row] = *row_scale;
  }

  // Inputs k0 to k0 + n of a panel as float32 (n, 32), before the scale of fp8.
  void unpack(int p, int k0, int n, float* out) const {
    if (format == BF16) {
      const uint16_t* w = (const uint16_t*)panel(p) + k0 * COLS;
      for (int i = 0; i < n * COLS; i++) out[i] = from_bf16(w[i]);
    } else if (format == FP8) {
      for (int k = 0; k < n; k++) {
        const uint8_t* from = panel(p) + (k0 + k) * COLS;
        if (k % 2 == 0) __builtin_prefetch(from + DEPTH * COLS);  // comes while this is multiplied
#if defined(__AVX512F__)
        Unpacked w(from);
        store_in_order(w.even, w.odd, out + k * COLS);
#else
        i8x w = *(const i8x_any*)from;
        for (int j = 0; j < 4; j++) *(f8x_any*)(out + k * COLS + 8 * j) = from_fp8(w, j);
#endif
      }
    } else {
      for (int k = 0; k < n; k++) {
        i8x w = *(const i8x_any*)(panel(p) + (k0 + k) / 2 * COLS);
        const float* s = &scale[((size_t)p * depth() + k0 + k) / GROUP * COLS];
        for (int j = 0; j < 4; j++) {
          i8x code = (w >> (8 * j + 4 * ((k0 + k) & 1)) & 15) - 8;
          *(f8x_any*)(out + k * COLS + 8 * j) =
              __builtin_convertvector(code, f8x) * *(const f8x_any*)(s + 8 * j);
        }
      }
    }
  }
};

// The nearest E4M3 number, for |x| <= 448. Halves go to even: of 3 bits of mantissa, or of steps of
// 2^-9 below the normal numbers.
static inline vf nearest_fp8(vf x) {
  vi bits = (vi)x;
  vf normal = (vf)((bits + 0x7FFFF + (bits >> 20 & 1)) & (int32_t)0xFFF00000);
  vf magic = splat(24576.f);  // 1.5 * 2^14: float32 there has steps of 2^-9
  vf tiny = (x + magic) - magic;
  return magnitude(x) < splat(0x1p-6f) ? tiny : normal;
}

// Inputs of a product, a row a token: float32, which fp8 rounds in place, or int8 codes.
struct Inputs {
  std::vector<float> scale;
  std::vector<Code> codes;
  std::vector<int32_t> excess;
  std::vector<Input> of_blocks;

  void reserve(int n_rows, int width) {
    size_t n = (size_t)n_rows * padded(width, GROUP);
    const size_t n_blocks = (size_t)n_rows * inputs_of((width + GROUP - 1) / GROUP);
    if (codes.size() < n) codes.resize(n), scale.resize(n), excess.resize(n / GROUP);
    if (of_blocks.size() < n_blocks) of_blocks.resize(n_blocks);
  }

  Input* for_blocks(int n_groups, int row) { return &of_blocks[(size_t)row * inputs_of(n_groups)]; }

  // For all matrices that take this input.
  void round(const Matrix* a, int n_matrices, int row, float* x) {
    bool int8 = false, blocks = false, whole = false;
    for (int i = 0; i < n_matrices; i++) {
      int8 |= a[i].format == INT8, blocks |= a[i].in_blocks(), whole |= a[i].whole_rows;
    }
    if (int8) round_int8(a->cols, row, x, whole);
    if (blocks) round_inputs(x, a->cols / GROUP, for_blocks(a->cols / GROUP, row));
    if (a->format == FP8) round_fp8(*a, row, x);
  }

  // A step for every GROUP of inputs, or one for the whole row.
  void round_int8(int n, int row, const float* x, bool whole) {
    float most_of_row = 1e-12f;
    for (int k = 0; whole && k < n; k++) most_of_row = std::max(most_of_row, std::fabs(x[k]));
    int width = padded(n, GROUP);
    Code* q = codes.data() + (size_t)row * width;
    for (int k = 0; k < n; k += GROUP) {
      size_t g = ((size_t)row * width + k) / GROUP;
      alignas(64) float rest[GROUP];
      const float* part = x + k;
      if (n - k < GROUP) {
        zero(rest, GROUP);
        copy(x + k, n - k, rest);
        part = rest;
      }
      vf most = splat(1e-12f);
      for (int i = 0; i < GROUP; i += W) most = larger(most, magnitude(load(part + i)));
      float step = (whole ? most_of_row : largest(most)) / 127.f;
      vi total = {};
      excess[g] = 0;
      for (int i = 0; i < GROUP; i += W) {
        vf magic = splat(12582912.f);
        vi code = __builtin_convertvector((load(part + i) / step + magic) - magic, vi);
        *(codes_any*)(q + k + i) = __builtin_convertvector(code, codes_any);
        total += code;
      }
      scale[g] = step;
      for (int j = 0; BIAS && j < W; j++) excess[g] += BIAS * total[j];
    }
  }

  void round_fp8(const Matrix& a, int row, float* x) {
    float step = a.input_scale;
    if (!step) {
      float most = 1e-12f;
      for (int k = 0; k < a.cols; k++) most = std::max(most, std::fabs(x[k]));
      step = most / 448.f;
      if (a.power_of_two) {
        int exponent;
        float mantissa = std::frexp(step, &exponent);
        step = std::ldexp(1.f, exponent - (mantissa == 0.5f));
      }
    }
    scale[row] = step;
    for (int k = 0; k < a.cols; k += W) {
      alignas(64) float part[W] = {};
      int n = std::min(W, a.cols - k);
      copy(x + k, n, part);
      vf y = smaller(larger(load(part) / step, splat(-448.f)), splat(448.f));
      store(part, nearest_fp8(y));
      copy(part, n, x + k);
    }
  }
};

// ---- threads ----------------------------------------------------------------------------------

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait for the word to leave `old`: spin briefly, as phases are microseconds apart, then sleep, as
// the other core may run another process.
static void wait_for_change(std::atomic<uint32_t>& word, uint32_t old) {
  for (int i = 0; i < 3000; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  word.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  explicit Pool(int n) : n_(std::max(n, 1)) {
    for (int t = 1; t < n; t++) workers_.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    job_ = nullptr;
    start();
    for (auto& w : workers_) w.join();
  }
  int size() const { return n_; }

  template <class F> void run(F&& f) {
    auto call = [](void* f, int t) { (*(F*)f)(t); };
    job_ = call, argument_ = &f, taken_ = 0;
    start();
    call(&f, 0);
    barrier();
  }

  // All threads meet; what was taken of the last phase is forgotten.
  void barrier() {
    uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)n_) {
      arrived_.store(0, std::memory_order_relaxed);
      taken_.store(0, std::memory_order_relaxed);
      // In sequence: notify_all asks afterwards whether anybody waits, and they ask for the phase.
      phase_.store(phase + 1);
      if (n_ > 1) phase_.notify_all();
    } else {
      wait_for_change(phase_, phase);
    }
  }

  // Share out 0 to n: large pieces first, small ones last, so that a thread that lost its core
  // for a while does not delay the others.
  template <class F> void share(int n, F&& f, int least = 1) {
    for (int from = taken_.load(std::memory_order_relaxed); from < n;) {
      int to = std::min(n, from + std::max(least, (n - from) / (2 * n_)));
      if (!taken_.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
      for (int i = from; i < to; i++) f(i);
      from = taken_.load(std::memory_order_relaxed);
    }
    barrier();
  }

 private:
  void start() {
    started_.fetch_add(1);
    if (n_ > 1) started_.notify_all();
  }
  void work(int t) {
    for (uint32_t seen = 0;; seen++) {
      wait_for_change(started_, seen);
      if (!job_) return;
      job_(argument_, t);
      barrier();
    }
  }
  const int n_;
  void (*job_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::atomic<uint32_t> started_{0}, phase_{0}, arrived_{0};
  std::atomic<int> taken_{0};
  std::vector<std::thread> workers_;
};

// ---- the model --------------------------------------------------------------------------------

struct Shape {  // mirrored in cpu.py, as is Step
  int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, n_threads;
  int32_t far_original;  // queries are scaled by 1 + far_beta * log(1 + position / far_original)
  float norm_eps, far_beta;
  double gain;  // of cosines and sines
};

struct Step {
  int32_t n_tokens, n_sequences, n_rows, table_width, page_size, kv_format;
  int64_t n_pages;
  const int32_t *tokens, *positions;          // (T,)
  const int64_t* slots;                       // (T,)
  const int32_t* cu_seqlens;                  // (S + 1,)
  const int32_t* page_table;                  // (S, table_width)
  const int32_t* rows;                        // (R,), tokens whose logits are wanted
  const int32_t* windows;                     // (L,), 0 for none
  uint8_t* kv_cache;                          // (L, 2, P, page_size, K, H)
  float* kv_scale;                            // fp8 (L, 2), int8 (L, 2, P, page_size, K)
  float* logits;                              // (R, V)
};

enum { WQ, WK, WV, WO, W1, W3, W2, PER_LAYER };

struct Scratch {  // of one thread
  alignas(64) float y[2][TALL * COLS], unpacked[DEPTH * COLS], weights[BLOCK * COLS];
  std::vector<float> q, keys, values, widened, out;
};

struct Model {
  Shape shape;
  Arena arena;
  std::vector<Matrix> matrices;  // PER_LAYER a layer, and the head
  std::vector<float> norms;      // (2 L + 1, D): attention_norm, ffn_norm, ..., norm
  std::vector<double> frequencies;
  Matrix embedding;  // rows of float32, bf16 or blocks
  Pool pool;
  Inputs inputs;
  std::vector<Scratch> scratch;
  std::vector<float> x, normed, qkv, attended, hidden, rope;
  struct Task { int sequence, from, to, head; };
  std::vector<Task> tasks;  // of attention

  explicit Model(const Shape& s)
      : shape(s), matrices(s.n_layers * PER_LAYER + 1), pool(s.n_threads), scratch(s.n_threads) {}

  // rows (M, K) of x times panel p -> y (M, 32); `next` is what is multiplied after it
  void product(const Matrix& a, int p, const uint8_t* next, const float* x, int first, int M, float* y,
               Scratch& s) {
    if (a.in_blocks()) {
      with_blocks(a.format, [&](auto type) {
        const int n_groups = a.cols / GROUP;
        multiply_blocks<decltype(type)>(a.panel(p), n_groups, inputs.for_blocks(n_groups, first), M, y);
      });
    } else if (a.format == INT8) {
      int n_groups = a.depth() / GROUP;
      int n_passes = (M + TILE - 1) / TILE * (M * V <= SUMS ? 1 : V / 2);
      Ahead ahead{next, n_passes};
      in_tiles(M, [&](int m, auto n) {
        size_t g = (size_t)(first + m) * n_groups;
        Codes in{inputs.codes.data() + g * GROUP, &inputs.scale[g], &inputs.excess[g], n_groups};
        rows_of8<n>(a.panel(p), in, y + m * COLS, COLS, ahead);
      });
    } else if (a.format == FP8 && M <= 2) {
      with_rows<2>(M, [&](auto n) {
        multiply_fp8<n>(a.panel(p), x + (size_t)first * a.cols, a.cols, a.cols, y);
      });
    } else {
      x += (size_t)first * a.cols;
      zero(y, M * COLS);
      for (int k = 0; k < a.cols; k += DEPTH) {
        int n = std::min(DEPTH, a.cols - k);
        if (a.format != FP32) a.unpack(p, k, n, s.unpacked);
        const float* w = a.format == FP32 ? (const float*)a.panel(p) + (size_t)k * COLS : s.unpacked;
        multiply(w, COLS, x + k, a.cols, M, n, y, COLS);
      }
    }
    if (a.format != FP8 && a.format != INT8) return;
    for (int m = 0; m < M; m++)
      for (int i = 0; i < COLS; i += W) {
        vf scaled = load(y + m * COLS + i) * load(&a.scale[p * COLS + i]);
        store(y + m * COLS + i, a.format == FP8 ? scaled * inputs.scale[first + m] : scaled);
      }
  }

  // Every row of x (T, K) times n matrices, shared out among threads by panels;
  // emit(row, first column, y, columns) gets each piece. Columns are counted through all matrices.
  template <class F> void matmul(int T, const Matrix* a, int n, const float* x, int t, F&& emit) {
    Scratch& s = scratch[t];
    int n_panels = 0;
    for (int i = 0; i < n; i++) n_panels += a[i].panels;
    pool.share(n_panels, [&](int p) {
      const Matrix* one = a;
      int column = 0;
      for (; p >= one->panels; one++) p -= one->panels, column += one->rows;
      const int rows = one->in_blocks() ? TALL : BLOCK;
      for (int first = 0; first < T; first += rows) {
        int M = std::min(rows, T - first);
        product(*one, p, one->panel(p + 1), x, first, M, s.y[0], s);
        for (int m = 0; m < M; m++)
          emit(first + m, column + p * COLS, s.y[0] + m * COLS, std::min(COLS, one->rows - p * COLS));
      }
    });
  }

  // The same with two matrices of one shape at a time: emit(row, column, y, y of the second, columns).
  template <class F> void matmul_both(int T, const Matrix* a, const float* x, int t, F&& emit) {
    Scratch& s = scratch[t];
    const int rows = a->in_blocks() || a[1].in_blocks() ? TALL : BLOCK;
    pool.share(a->panels, [&](int p) {
      for (int first = 0; first < T; first += rows) {
        int M = std::min(rows, T - first);
        product(a[0], p, a[1].panel(p), x, first, M, s.y[0], s);
        product(a[1], p, a[0].panel(p + 1), x, first, M, s.y[1], s);
        for (int m = 0; m < M; m++)
          emit(first + m, p * COLS, s.y[0] + m * COLS, s.y[1] + m * COLS,
               std::min(COLS, a->rows - p * COLS));
      }
    });
  }

  void norm(const float* x, const float* gain, float* y) {
    vf squares = {};
    int D = shape.dim, whole = D / W * W;
    for (int i = 0; i < whole; i += W) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int i = whole; i < D; i++) total += x[i] * x[i];
    float r = 1.f / std::sqrt(total / D + shape.norm_eps);
    for (int i = 0; i < D; i++) y[i] = x[i] * r * gain[i];
  }

  // Every index in a step must lie inside the array that it indexes.
  bool valid(const Step& s) const {
    auto below = [](int64_t x, int64_t end) { return x >= 0 && x < end; };
    if (s.cu_seqlens[0] != 0 || s.cu_seqlens[s.n_sequences] != s.n_tokens) return false;
    for (int i = 0; i < s.n_rows; i++)
      if (!below(s.rows[i], s.n_tokens)) return false;
    for (int i = 0; i < s.n_sequences; i++)
      for (int j = s.cu_seqlens[i]; j < s.cu_seqlens[i + 1]; j++) {
        if (!below(j, s.n_tokens) || !below(s.tokens[j], shape.vocab_size)) return false;
        if (!below(s.positions[j], (int64_t)s.table_width * s.page_size)) return false;
        if (!below(s.slots[j], s.n_pages * s.page_size)) return false;
        if (j > s.cu_seqlens[i] && s.positions[j] != s.positions[j - 1] + 1) return false;
        if (j == s.cu_seqlens[i + 1] - 1)
          for (int p = 0; p <= s.positions[j] / s.page_size; p++)
            if (!below(s.page_table[(size_t)i * s.table_width + p], s.n_pages)) return false;
      }
    return true;
  }

  // The scale of one head of a key (part 0) or value (1).
  float* kv_scale(const Step& s, int layer, int part, size_t slot, int head) const {
    size_t side = 2 * layer + part, n_slots = s.n_pages * s.page_size;
    if (s.kv_format == FP8) return s.kv_scale + side;
    return s.kv_format == INT8 ? s.kv_scale + (side * n_slots + slot) * shape.n_kv_heads + head : nullptr;
  }

  // What a query is multiplied by, as in positions.query_scale, before its products with keys.
  float query_scale(int position) const {
    const float scale = 1.f / std::sqrt((float)shape.head_dim);
    if (shape.far_original == 0) return scale;
    return scale * (float)(1 + shape.far_beta * std::log1p((double)(position / shape.far_original)));
  }

  void step(const Step& step);
  void attend(const Step& step, int layer, const Task& task, const Task* next, Scratch& s);
};

// W bytes as integers. The compilers' own conversion goes byte by byte.
static inline vi from_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__) && !defined(VNNI)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef int8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*(const bytes*)p, vi);
#endif
}

constexpr int CACHE_BYTES[] = {4, 2, 1, 1};  // a number, by format

// The keys or values of one head, H numbers, from the cache.
static inline void from_cache(const uint8_t* from, int format, const float* scale, int H, float* to) {
  int h = 0;
  if (format == FP32) copy((const float*)from, H, to);
  if (format == BF16)
    for (; h < H; h++) to[h] = from_bf16(((const uint16_t*)from)[h]);
  if (format != FP8 && format != INT8) return;
  auto number = [&](vi code) {  // as `from_fp8`
    return (format == INT8 ? to_float(code) : (vf)(code << 20 & (int32_t)0x87F00000) * 0x1p120f) * *scale;
  };
#if defined(__AVX512F__)
  if (format == FP8)
    for (; h + W <= H; h += W) {
      __m256i halves = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + h)));
      store(to + h, from_halves(_mm256_slli_epi16(halves, 8)) * (256.f * *scale));
    }
#endif
  for (; h + W <= H; h += W)
    store(to + h, number(from_bytes(from + h)));
  for (; h < H; h++) to[h] = number(splat((int8_t)from[h]))[0];
}

// The opposite. int8 finds its scale here, fp8 is given one.
static inline void to_cache(const float* from, int format, float* scale, int H, uint8_t* to) {
  if (format == FP32) std::memcpy(to, from, H * sizeof(float));
  if (format == BF16)
    for (int h = 0; h < H; h++) ((uint16_t*)to)[h] = to_bf16(from[h]);
  if (format == FP8)
    for (int h = 0; h < H; h++) {
      vf y = nearest_fp8(smaller(larger(splat(from[h] / *scale), splat(-448.f)), splat(448.f)));
      uint32_t bits = ((vi)(y * 0x1p-120f))[0];
      to[h] = (bits >> 24 & 0x80) | (bits >> 20 & 0x7F);
    }
  if (format == INT8) {
    float most = 1e-12f;
    for (int h = 0; h < H; h++) most = std::max(most, std::fabs(from[h]));
    *scale = most / 127.f;
    for (int h = 0; h < H; h++) to[h] = (uint8_t)(int8_t)std::nearbyint(from[h] / *scale);
  }
}

static inline float* grow(std::vector<float>& v, size_t n) {
  if (v.size() < n) v.resize(n);
  return v.data();
}

// Goes from one key of a sequence to the next, through its pages.
struct Walk {
  const Step& step;
  const int32_t* table;
  int position, page, offset;
  Walk(const Step& step, int sequence, int position)
      : step(step), table(step.page_table + (size_t)sequence * step.table_width),
        position(position), page(position / step.page_size), offset(position % step.page_size) {}
  // The tile of keys where a task begins, [from, to) being its queries.
  static Walk first_of(const Step& step, int sequence, int from, int window) {
    int oldest = window ? std::max(0, step.positions[from] - window + 1) : 0;
    return Walk(step, sequence, oldest / COLS * COLS);
  }
  size_t row() const { return (size_t)table[page] * step.page_size + offset; }
  void next() {
    position++;
    if (++offset == step.page_size) offset = 0, page++;
  }
};

// Queries [from, to) of a sequence and the heads that share one head of keys and values, as one
// stack of rows: scores, softmax and weighted values tile by tile (FlashAttention's recurrence).
void Model::attend(const Step& step, int layer, const Task& task, const Task* next, Scratch& s) {
  const int H = shape.head_dim, N = shape.n_heads, K = shape.n_kv_heads, G = N / K;
  const int width = padded(H, COLS), R = (task.to - task.from) * G, stride = (N + 2 * K) * H;
  const size_t bytes = CACHE_BYTES[step.kv_format];
  const size_t pool_bytes = (size_t)step.n_pages * step.page_size * K * H * bytes;
  const uint8_t* k_pages = step.kv_cache + 2 * layer * pool_bytes;
  float *q = grow(s.q, R * H), *keys = grow(s.keys, H * COLS), *out = grow(s.out, R * width);
  float *values = grow(s.values, COLS * width), *widened = grow(s.widened, (COLS + 1) * H);
  float* zeros = widened + COLS * H;
  std::fill(zeros, zeros + H, 0.f);
  std::vector<float> most(R, -1e30f), total(R, 0.f);
  std::fill(out, out + R * width, 0.f);
  const int window = step.windows[layer];
  for (int r = 0; r < R; r++) {
    const float scale = query_scale(step.positions[task.from + r / G]);
    const float* from = &qkv[(size_t)(task.from + r / G) * stride + (task.head * G + r % G) * H];
    for (int h = 0; h < H; h++) q[r * H + h] = from[h] * scale;
  }
  const int last = step.positions[task.to - 1];
  const size_t row_bytes = (size_t)K * H * bytes;
  // What comes next is fetched while this is computed: this task's tiles, then the next one's first.
  auto fetch = [&](Walk& walk, int head, int end) {
    if (walk.position >= end) return false;
    const uint8_t* soon = k_pages + walk.row() * row_bytes + head * H * bytes;
    for (size_t i = 0; i < H * bytes; i += 64)
      __builtin_prefetch(soon + i), __builtin_prefetch(soon + pool_bytes + i);
    walk.next();
    return true;
  };
  Walk key = Walk::first_of(step, task.sequence, task.from, window);
  Walk ahead(step, task.sequence, key.position + COLS);
  const Task& after = next ? *next : task;
  Walk beyond = Walk::first_of(step, after.sequence, after.from, window);
  const int border = next ? std::min(beyond.position + COLS, step.positions[after.to - 1] + 1) : 0;
  for (int j0 = key.position; j0 <= last; j0 += COLS) {
    const int n = std::min(COLS, last + 1 - j0);
    // Beyond the last key stand zeros: whatever lies in the page must not become a NaN.
    zero(values + n * width, (COLS - n) * width);
    const float* rows[COLS];
    for (int j = 0; j < COLS; j++) rows[j] = zeros;
    for (int j = 0; j < n; j++, key.next()) {
      const uint8_t* k = k_pages + key.row() * row_bytes + task.head * H * bytes;
      const uint8_t* v = k + pool_bytes;
      if (!fetch(ahead, task.head, last + 1)) fetch(beyond, after.head, border);
      if (step.kv_format == FP32) {
        rows[j] = (const float*)k;
      } else {
        from_cache(k, step.kv_format, kv_scale(step, layer, 0, key.row(), task.head), H,
                   widened + j * H);
        rows[j] = widened + j * H;
      }
      from_cache(v, step.kv_format, kv_scale(step, layer, 1, key.row(), task.head), H,
                 values + j * width);
    }
    for (int j = 0; j < COLS; j += 8) transpose8(rows + j, H, keys + j);
    for (int r0 = 0; r0 < R; r0 += BLOCK) {
      const int M = std::min(BLOCK, R - r0);
      float* score = s.weights;
      zero(score, M * COLS);
      multiply(keys, COLS, q + r0 * H, H, M, H, score, COLS);
      for (int m = 0; m < M; m++, score += COLS) {
        const int r = r0 + m, position = step.positions[task.from + r / G];
        const int begin = window ? position - window + 1 : 0;
        if (j0 + COLS > position + 1 || j0 < begin)
          for (int j = 0; j < COLS; j++)
            if (j0 + j > position || j0 + j < begin) score[j] = -INFINITY;
        vf peak = splat(most[r]);
        for (int i = 0; i < COLS; i += W) peak = larger(peak, load(score + i));
        const float top = largest(peak);
        const float faded = exponential(splat(most[r] - top))[0];
        vf added = {};
        for (int i = 0; i < COLS; i += W) {
          vf weight = exponential(load(score + i) - top);
          store(score + i, weight), added += weight;
        }
        most[r] = top, total[r] = total[r] * faded + sum(added);
        if (faded != 1.f)
          for (int h = 0; h < width; h += W) store(out + r * width + h, load(out + r * width + h) * faded);
      }
      for (int h = 0; h < width; h += COLS)
        multiply(values + h, width, s.weights, COLS, M, COLS, out + r0 * width + h, width);
    }
  }
  for (int r = 0; r < R; r++) {
    float* to = &attended[((size_t)(task.from + r / G) * N + task.head * G + r % G) * H];
    for (int h = 0; h < H; h++) to[h] = out[r * width + h] / total[r];
  }
}

void Model::step(const Step& step) {
  const int T = step.n_tokens, D = shape.dim, H = shape.head_dim, F = shape.hidden_dim;
  const int N = shape.n_heads, K = shape.n_kv_heads, stride = (N + 2 * K) * H, L = shape.n_layers;
  const int tall = std::max(T, step.n_rows);
  grow(x, (size_t)tall * D), grow(normed, (size_t)tall * D), grow(qkv, (size_t)T * stride);
  grow(attended, (size_t)tall * N * H), grow(hidden, (size_t)tall * F), grow(rope, (size_t)T * H);
  inputs.reserve(tall, std::max({D, N * H, F}));
  tasks.clear();
  const int block = std::max(1, BLOCK / (N / K));  // queries of an attention task
  for (int i = 0; i < step.n_sequences; i++)
    for (int from = step.cu_seqlens[i]; from < step.cu_seqlens[i + 1]; from += block)
      for (int head = 0; head < K; head++)
        tasks.push_back({i, from, std::min(from + block, step.cu_seqlens[i + 1]), head});

  pool.run([&](int t) {
    pool.share(T, [&](int i) {
      const uint8_t* row = embedding.stored + step.tokens[i] * embedding.row_bytes;
      float* to = &x[(size_t)i * D];
      if (embedding.format == FP32) std::memcpy(to, row, D * sizeof(float));
      else if (embedding.format == BF16)
        for (int d = 0; d < D; d++) to[d] = from_bf16(((const uint16_t*)row)[d]);
      else
        with_blocks(embedding.format, [&](auto type) { row_of_blocks<decltype(type)>(row, D, to); });
      for (int h = 0; h < H / 2; h++) {  // in double, as in transformer.rotary
        double angle = step.positions[i] * frequencies[h];
        rope[(size_t)i * H + 2 * h] = shape.gain * std::cos(angle);
        rope[(size_t)i * H + 2 * h + 1] = shape.gain * std::sin(angle);
      }
    });
    int n = T;  // rows that the rest of the network still needs
    for (int layer = 0; layer < L; layer++) {
      const Matrix* a = &matrices[layer * PER_LAYER];
      const float* gains = &norms[(size_t)2 * layer * D];
      pool.share(n, [&](int i) {
        float* y = &normed[(size_t)i * D];
        norm(&x[(size_t)i * D], gains, y);
        inputs.round(a + WQ, 3, i, y);
      });
      matmul(n, a + WQ, 3, normed.data(), t, [&](int i, int column, float* y, int width) {
        copy(y, width, &qkv[(size_t)i * stride + column]);
      });
      pool.share(n, [&](int i) {
        float *row = &qkv[(size_t)i * stride], *turn = &rope[(size_t)i * H];
        for (int head = 0; head < N + K; head++, row += H)
          for (int h = 0; h < H; h += 2) {
            float re = row[h], im = row[h + 1];
            row[h] = re * turn[h] - im * turn[h + 1], row[h + 1] = re * turn[h + 1] + im * turn[h];
          }
        const float* kv = &qkv[(size_t)i * stride + N * H];
        for (int part = 0; part < 2; part++, kv += K * H) {
          size_t at = (size_t)(2 * layer + part) * step.n_pages * step.page_size + step.slots[i];
          for (int head = 0; head < K; head++)
            to_cache(kv + head * H, step.kv_format,
                     kv_scale(step, layer, part, step.slots[i], head), H,
                     step.kv_cache + (at * K + head) * H * CACHE_BYTES[step.kv_format]);
        }
      });
      pool.share((int)tasks.size(), [&](int i) { 
        const Task* next = i + 1 < (int)tasks.size() ? &tasks[i + 1] : nullptr;
        attend(step, layer, tasks[i], next, scratch[t]);
      });
      if (layer == L - 1) {  // keys and values are written: only the wanted rows go on
        n = step.n_rows;
        if (t == 0) {
          std::vector<float> wanted((size_t)n * std::max(D, N * H));
          auto gather = [&](std::vector<float>& from, size_t width) {
            for (int i = 0; i < n; i++)
              std::memcpy(&wanted[i * width], &from[step.rows[i] * width], width * sizeof(float));
            std::memcpy(from.data(), wanted.data(), n * width * sizeof(float));
          };
          gather(x, D), gather(attended, (size_t)N * H);
        }
        pool.barrier();
      }
      pool.share(n, [&](int i) { inputs.round(a + WO, 1, i, &attended[(size_t)i * N * H]); });
      auto add = [&](int i, int column, float* y, int width) {
        for (int j = 0; j < width; j++) x[(size_t)i * D + column + j] += y[j];
      };
      matmul(n, a + WO, 1, attended.data(), t, add);
      pool.share(n, [&](int i) {
        float* y = &normed[(size_t)i * D];
        norm(&x[(size_t)i * D], gains + D, y);
        inputs.round(a + W1, 2, i, y);
      });
      matmul_both(n, a + W1, normed.data(), t, [&](int i, int column, float* g, float* u, int width) {
        for (int j = 0; j < COLS; j += W) {
          vf gate = load(g + j);
          store(g + j, gate / (1.f + exponential(-gate)) * load(u + j));
        }
        copy(g, width, &hidden[(size_t)i * F + column]);
      });
      pool.share(n, [&](int i) { inputs.round(a + W2, 1, i, &hidden[(size_t)i * F]); });
      matmul(n, a + W2, 1, hidden.data(), t, add);
    }
    const Matrix& head = matrices.back();
    pool.share(n, [&](int i) {
      float* y = &normed[(size_t)i * D];
      norm(&x[(size_t)i * D], &norms[(size_t)2 * L * D], y);
      inputs.round(&head, 1, i, y);
    });
    matmul(n, &head, 1, normed.data(), t, [&](int i, int column, float* y, int width) {
      copy(y, width, step.logits + (size_t)i * shape.vocab_size + column);
    });
  });
}

// ---- the calls, made by cpu.py ----------------------------------------------------------------

extern "C" {
Model* model_new(const Shape* shape, const double* frequencies, const uint8_t* embedding,
                 int embedding_format, int64_t embedding_row_bytes) {
  Model* m = new Model(*shape);
  m->norms.resize((size_t)(2 * shape->n_layers + 1) * shape->dim);
  m->frequencies.assign(frequencies, frequencies + shape->head_dim / 2);
  m->embedding.refer((Format)embedding_format, shape->vocab_size, shape->dim, embedding, embedding_row_bytes);
  return m;
}
void model_free(Model* m) { delete m; }
void model_norm(Model* m, int index, const float* gains) {
  std::memcpy(&m->norms[(size_t)index * m->shape.dim], gains, m->shape.dim * sizeof(float));
}

void matrix_shape(Model* m, int index, int format, int rows, int cols, float input_scale,
                  int power_of_two, int whole_rows) {
  Matrix& a = m->matrices[index];
  a.shape((Format)format, rows, cols, m->arena);
  a.input_scale = input_scale, a.power_of_two = power_of_two, a.whole_rows = whole_rows;
}

// Rows of codes, row_bytes apart, to their places.
void matrix_pack(Model* m, int index, const uint8_t* codes, int64_t row_bytes, const float* scale,
                 int scales_per_row) {
  Matrix& a = m->matrices[index];
  m->pool.run([&](int) {
    m->pool.share(a.panels, [&](int p) { a.pack_panel(p, codes, row_bytes, scale, scales_per_row); });
  });
}

// One matrix of a model by itself: x (T, cols), which fp8 rounds in place, -> y (T, rows).
void model_multiply(Model* m, int index, float* x, int T, float* y) {
  const Matrix* a = &m->matrices[index];
  m->inputs.reserve(T, a->cols);
  m->pool.run([&](int t) {
    m->pool.share(T, [&](int i) { m->inputs.round(a, 1, i, x + (size_t)i * a->cols); });
    m->matmul(T, a, 1, x, t, [&](int i, int column, float* part, int width) {
      copy(part, width, y + (size_t)i * a->rows + column);
    });
  });
}

// One product by itself: x (T, cols) times rows of blocks -> y (T, rows).
void blocks_multiply(int format, int rows, int cols, const uint8_t* codes, int64_t row_bytes,
                     const float* x, int T, float* y, int n_threads) {
  Shape shape{};
  shape.n_threads = n_threads;
  Model m(shape);
  m.matrices[0].shape((Format)format, rows, cols, m.arena);
  matrix_pack(&m, 0, codes, row_bytes, nullptr, 0);
  model_multiply(&m, 0, const_cast<float*>(x), T, y);  // nothing rounds in place for blocks
}

// Bytes of a panel of 32 rows of blocks.
int64_t blocks_panel(int format, int cols) {
  int64_t n_bytes = 0;
  with_blocks(format, [&](auto type) { n_bytes = panel_of_blocks<decltype(type)>(cols / GROUP); });
  return n_bytes;
}

// Rows of blocks as numbers (rows, cols).
void blocks_rows(int format, int rows, int cols, const uint8_t* codes, int64_t row_bytes, float* to,
                 int n_threads) {
  Pool pool(n_threads);
  pool.run([&](int) {
    pool.share(rows, [&](int i) {
      with_blocks(format, [&](auto type) {
        row_of_blocks<decltype(type)>(codes + i * row_bytes, cols, to + (size_t)i * cols);
      });
    });
  });
}

// Weights and importance (n_groups, n) to codes and scales, by groups or blocks.
void blocks_fit(const Grid* grid, int64_t n_groups, const float* weights, const float* importance,
                Fitted* to) {
  Groups groups(*grid);
  for (int64_t g = 0; g < n_groups; g += SIDE_BY_SIDE)
    groups.fit(weights + g * grid->n, importance + g * grid->n,
               (int)std::min<int64_t>(SIDE_BY_SIDE, n_groups - g), g, *to);
}

int model_step(Model* m, const Step* step) {
  if (!m->valid(*step)) return 1;
  m->step(*step);
  return 0;
}
}
