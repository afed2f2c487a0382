// Products of a matrix with a few vectors, which read the matrix once: y[b] = W x[b].
//
// W is fp32 or bf16, row by row as PyTorch has it, or quantised in the layout of ops/quantized.
// Work is cut into tiles of 16 neighbouring outputs. A number of a result is summed in the same
// order whatever the number of vectors beside it, and whichever thread has its tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm_bf16.h"
#include "vector.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int TILE = 16;         // outputs
constexpr int GROUP = 32;        // inputs that share a scale
constexpr int64_t PADDING = 64;  // vectors are readable, and zero, up to a multiple of this

static inline int64_t padded(int64_t n) { return (n + PADDING - 1) / PADDING * PADDING; }

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

// Ask for what will be needed in about a microsecond, which is this many bytes later. The processor
// foresees one stream within a page of memory; this crosses pages and goes from one matrix to the
// next, and nearly doubles what bf16 weights get out of memory.
constexpr int64_t AHEAD = 8192;
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// A matrix, or the first of several of one shape that lie one after another.
struct Matrix {
  const void* values;
  const void* scales;  // of a quantised one
  int64_t rows, columns;
  int64_t kind;

  int64_t tiles() const { return (rows + TILE - 1) / TILE; }
  int64_t groups() const { return (columns + GROUP - 1) / GROUP; }
  bool is_quantized() const { return kind == INT8 || kind == INT4; }
  int64_t tile_bytes() const {  // of its values
    switch (kind) {
      case FP32: return TILE * columns * 4;
      case BF16: return TILE * columns * 2;
      default: return groups() * TILE * (kind == INT8 ? GROUP : GROUP / 2);
    }
  }
  // How many tiles before its turn one is to be asked for.
  int64_t lead() const { return std::max<int64_t>(1, AHEAD / tile_bytes()); }
  const uint8_t* tile(int64_t index) const {
    return static_cast<const uint8_t*>(values) + index * tile_bytes();
  }

  Matrix at(int64_t index) const {  // one of several, such as an expert
    Matrix one = *this;
    const char* start = static_cast<const char*>(values);
    switch (kind) {
      case FP32: one.values = start + index * rows * columns * 4; break;
      case BF16: one.values = start + index * rows * columns * 2; break;
      default: {
        int64_t packed = tiles() * groups() * TILE;
        one.values = start + index * packed * (kind == INT8 ? GROUP : GROUP / 2);
        one.scales = static_cast<const uint16_t*>(scales) + index * packed;
      }
    }
    return one;
  }

  Matrix cut(int64_t first, int64_t count) const {  // some rows of one that is not quantised
    Matrix part = *this;
    part.values = static_cast<const char*>(values) + first * columns * (kind == FP32 ? 4 : 2);
    part.rows = count;
    return part;
  }
};

// What multiplies a matrix: numbers, and for quantised matrices what they were rounded to.
struct Vector {
  const float* values;
  const int8_t* codes;
  const float* scales;   // of each group
  const int32_t* sums;   // minus the sum of each group's codes
};

// Several of them, and perhaps what `pack_parts` makes of them.
struct Vectors {
  const Vector* each;
  int64_t count;
  const bf16* parts = nullptr;
};

static inline vec load(const bf16* p) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
  typedef uint32_t words __attribute__((vector_size(LANES * 4)));
  halves half;
  memcpy(&half, p, sizeof half);
  return (vec)(__builtin_convertvector(half, words) << 16);
#endif
}

template <class W>
static inline vec load_some(const W* p, int64_t count) {  // 0 < count < LANES; zeros behind
  W room[LANES] = {};
  memcpy(room, p, count * sizeof(W));
  return load(room);
}

// One of several passes over the same weights, for the vectors from `first`.
struct Pass {
  int64_t index, count, first;

  // How far from a piece of the weights lies what is to be asked for there. Each pass sees to its
  // share of what is `distance` bytes away, so that memory is never idle.
  int64_t ahead(int64_t piece, int64_t distance) const {
    return piece % count == index ? distance : 0;
  }
};

// The weights at hand are gone through `of` times one after another, now for the time `index`.
struct Turn {
  int64_t index = 0, of = 1;
};

// visit(n as a constant), n from 1 to MOST
template <int MOST, class Visit>
static inline void with_constant(int64_t n, Visit visit) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_constant<MOST - 1>(n, visit);
  visit(std::integral_constant<int, MOST>{});
}

// Passes of at most MOST vectors each: visit(pass, how many, as a constant)
template <int MOST, class Visit>
static inline void in_passes(int64_t count, Turn turn, Visit visit) {
  const int64_t passes = (count + MOST - 1) / MOST, end = (turn.index + 1) * passes;
  Pass pass{turn.index * passes, turn.of * passes, 0};
  for (; pass.index < end; pass.index++) {
    const int64_t here = (count - pass.first) / (end - pass.index);
    with_constant<MOST>(here, [&](auto constant) { visit(pass, constant); });
    pass.first += here;
  }
}

// to[i] = sum(from[i])
static inline void sum_four(const vec from[4], float* to) {
#if defined(__AVX512F__)
  // The same order of sums as in `sum`: halves are added until there are four numbers of each.
  const auto add_halves = [](vec first, vec second) {
    const __m512 a = (__m512)first, b = (__m512)second;
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  };
  const __m512 ab = add_halves(from[0], from[1]), cd = add_halves(from[2], from[3]);
  __m512 all = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  all += _mm512_permute_ps(all, 0x4e);
  all += _mm512_permute_ps(all, 0xb1);
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
#else
  for (int i = 0; i < 4; i++) to[i] = sum(from[i]);
#endif
}

// ROWS rows with COUNT vectors; out[b * TILE + r].
template <class W, int ROWS, int COUNT>
static inline __attribute__((always_inline)) void float_rows(const W* w, int64_t columns,
                                                             const Vector* x, float* out,
                                                             Pass pass, int64_t to_next) {
  constexpr int64_t LINE = 64 / sizeof(W);  // numbers
  const float* from[COUNT];
  int64_t ahead[ROWS];
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) from[b] = x[b].values;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) ahead[r] = pass.ahead(r, to_next);
  vec total[COUNT][ROWS] = {};
  int64_t k = 0;
  for (; k + LINE <= columns; k += LINE) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
      prefetch(reinterpret_cast<const char*>(w + r * columns + k) + ahead[r]);
#pragma GCC unroll 8
    for (int64_t i = k; i < k + LINE; i += LANES) {
      vec left[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) left[r] = load(w + r * columns + i);
#pragma GCC unroll 8
      for (int b = 0; b < COUNT; b++) {
        vec right = load(from[b] + i);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) total[b][r] += left[r] * right;
      }
    }
  }
  for (; k < columns; k += LANES) {
    const int64_t rest = columns - k;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const W* at = w + r * columns + k;
      vec left = rest < LANES ? load_some(at, rest) : load(at);
#pragma GCC unroll 8
      for (int b = 0; b < COUNT; b++) total[b][r] += left * load(from[b] + k);
    }
  }
  vec* sums = total[0];
  float single[ROWS * COUNT + 3];
  int i = 0;
#pragma GCC unroll 16
  for (; i + 4 <= ROWS * COUNT; i += 4) sum_four(sums + i, single + i);
#pragma GCC unroll 4
  for (; i < ROWS * COUNT; i++) single[i] = sum(sums[i]);
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) memcpy(out + b * TILE, single + b * ROWS, ROWS * sizeof(float));
}

template <class W>
static void float_tile(const void* values, int64_t rows, int64_t columns, const Vector* x,
                       int64_t count, float* out, int64_t to_next, Turn turn) {
  const W* w = static_cast<const W*>(values);
  in_passes<4>(count, turn, [&](Pass pass, auto constant) {  // more leave too little of the cache
    constexpr int N = decltype(constant)::value, ROWS = 4;
    const Vector* with = x + pass.first;
    float* to = out + pass.first * TILE;
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      float_rows<W, ROWS, N>(w + r * columns, columns, with, to + r, pass, to_next);
    for (; r < rows; r++)
      float_rows<W, 1, N>(w + r * columns, columns, with, to + r, pass, to_next);
  });
}

// --- bf16 on AMX ------------------------------------------------------------------------------
//
// Tiles multiply bf16 numbers and sum in fp32. The weights are such numbers; a vector's are cut into
// three, of 8 bits each, so that every product is as exact as the vector: PARTS columns of the right
// side stand for one vector, and do not know of those beside them.

constexpr int64_t PARTS = 3;
constexpr int64_t WIDEST = 6;  // tiles of columns in one pass: two whole groups of 16 vectors

static inline int64_t part_tiles(int64_t count) { return (PARTS * count + TILE - 1) / TILE; }

// bf16 numbers that `pack_parts` writes.
static inline int64_t parts_size(int64_t count, int64_t columns) {
  return part_tiles(count) * TILE * columns;
}

static inline bool is_for_tiles(const Matrix& m) {
  return m.rows >= TILE && m.kind == BF16 && m.columns % 32 == 0 && amx_granted();
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
// The parts of 32 numbers, `stride` bf16 numbers from one to the next.
static inline void split(const float* x, bf16* to, int64_t stride) {
  const __m512i upper_halves = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
      17, 15, 13, 11, 9, 7, 5, 3, 1);
  const auto upper = [](vec x) { return (vec)((ivec)x & int32_t(0xffff0000)); };
  vec low = load(x), high = load(x + LANES);
#pragma GCC unroll 3
  for (int64_t p = 0; p < PARTS; p++) {
    _mm512_storeu_si512(to + p * stride,
                        _mm512_permutex2var_epi16((__m512i)low, upper_halves, (__m512i)high));
    low -= upper(low);
    high -= upper(high);
  }
}

// To [columns / 32][part_tiles][16 pairs of inputs][16 columns].
static void pack_parts(const Vector* x, int64_t count, int64_t columns, bf16* to) {
  alignas(64) bf16 parts[PARTS * TILE][32] = {};
  const int64_t tiles = part_tiles(count);
  for (int64_t first = 0; first < count; first += TILE) {
    const int64_t here = std::min<int64_t>(TILE, count - first);
    for (int64_t k = 0; k < columns; k += 32) {
      for (int64_t b = 0; b < here; b++) split(x[first + b].values + k, parts[PARTS * b], 32);
      bf16* tile = to + (k / 32 * tiles + first * PARTS / TILE) * (TILE * 32);
      for (int64_t n = 0; n < part_tiles(here); n++, tile += TILE * 32)  // pairs move as one number
        transpose_square(reinterpret_cast<const float*>(parts[n * TILE]), TILE,
                         reinterpret_cast<float*>(tile), TILE);
    }
  }
}

// 16 rows of weights times WIDE tiles of columns; to [WIDE][16 rows][16 columns].
template <int WIDE>
static void multiply_parts(const bf16* w, int64_t columns, const bf16* parts, int64_t tiles,
                           float* to, Pass pass, int64_t to_next) {
#define EACH_TILE(DO) \
  DO(0) if constexpr (WIDE > 1) { DO(1) } if constexpr (WIDE > 2) { DO(2) } \
  if constexpr (WIDE > 3) { DO(3) } if constexpr (WIDE > 4) { DO(4) } if constexpr (WIDE > 5) { DO(5) }
#define ZERO(n) _tile_zero(n);
#define ADD(n) _tile_loadd(7, parts + n * TILE * 32, 64); _tile_dpbf16ps(n, 6, 7);
#define STORE(n) _tile_stored(n, to + n * TILE * TILE, 64);
  before_tile_loads();
  EACH_TILE(ZERO)
  for (int64_t k = 0; k < columns; k += 32, parts += tiles * TILE * 32) {
    const char* next = reinterpret_cast<const char*>(w + k * TILE) + pass.ahead(k / 32, to_next);
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) prefetch(next + i * 64);
    _tile_loadd(6, w + k, columns * sizeof(bf16));
    EACH_TILE(ADD)
  }
  EACH_TILE(STORE)
#undef EACH_TILE
#undef ZERO
#undef ADD
#undef STORE
}

static void amx_tile(const bf16* w, int64_t columns, const Vectors& x, float* out,
                     int64_t to_next, Turn turn) {
  using Multiply = decltype(&multiply_parts<1>);
  constexpr Multiply BY_WIDTH[] = {multiply_parts<1>, multiply_parts<2>, multiply_parts<3>,
                                   multiply_parts<4>, multiply_parts<5>, multiply_parts<6>};
  alignas(64) float products[WIDEST * TILE * TILE];
  const int64_t tiles = part_tiles(x.count), passes = (tiles + WIDEST - 1) / WIDEST;
  for (int64_t i = 0; i < passes; i++) {
    const int64_t first = i * WIDEST, wide = std::min(WIDEST, tiles - first);
    const Pass pass{turn.index * passes + i, turn.of * passes, first * TILE / PARTS};
    BY_WIDTH[wide - 1](w, columns, x.parts + first * TILE * 32, tiles, products, pass, to_next);
    for (int64_t n = 0; n < wide; n++)
      transpose_square(products + n * TILE * TILE, TILE, products + n * TILE * TILE, TILE);
    const float* from = products;
    const int64_t last = std::min(x.count, pass.first + WIDEST * TILE / PARTS);
    for (int64_t b = pass.first; b < last; b++, from += PARTS * TILE)
      store(out + b * TILE, load(from) + (load(from + TILE) + load(from + 2 * TILE)));
  }
}

// y[PARTS b + p][0..columns) += sum over 32 rows of part p of c[b][r], times W[r][0..columns): what
// `join_parts` makes a sum of `add_rows`. There are as many rows of y as fill tiles, and `room` for
// parts_size(count, 32) numbers; columns are a multiple of 32. Of what is `to_next` bytes further
// this asks for every other kilobyte, and Turn{0, 2} for those between.
static void add_parts(const bf16* w, int64_t columns, const float* c, int64_t c_stride,
                      int64_t count, float* y, int64_t y_stride, int64_t to_next, bf16* room) {
  const int64_t tiles = part_tiles(count), y_row = y_stride * sizeof(float);
  std::fill(room, room + parts_size(count, 32), bf16{});
  for (int64_t b = 0; b < count; b++) split(c + b * c_stride, room + b * PARTS * 32, 32);
  alignas(64) int16_t places[32];
  for (int i = 0; i < 32; i++) places[i] = i / 2 + i % 2 * 32;
  const __m512i low = _mm512_load_si512(places);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  alignas(64) bf16 pairs[2][TILE][32];  // of rows, for 16 columns and for the next
  for (int64_t k = 0; k < columns; k += 32) {
    const char* next = reinterpret_cast<const char*>(w + k * 32) + to_next + 1024;
    for (int64_t i = 0; i < TILE; i++) {
      prefetch(next + i * 64);
      const __m512i a = _mm512_loadu_si512(w + 2 * i * columns + k);
      const __m512i b = _mm512_loadu_si512(w + (2 * i + 1) * columns + k);
      _mm512_store_si512(pairs[0][i], _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(pairs[1][i], _mm512_permutex2var_epi16(a, high, b));
    }
    before_tile_loads();
    _tile_loadd(3, pairs[0], 64);
    _tile_loadd(4, pairs[1], 64);
    for (int64_t m = 0; m < tiles; m++) {
      float* to = y + m * TILE * y_stride + k;
      _tile_loadd(0, to, y_row);
      _tile_loadd(1, to + TILE, y_row);
      _tile_loadd(2, room + m * TILE * 32, 64);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
      _tile_stored(0, to, y_row);
      _tile_stored(1, to + TILE, y_row);
    }
  }
  before_tile_loads();
}
#else
static inline void add_parts(const bf16*, int64_t, const float*, int64_t, int64_t, float*,
                             int64_t, int64_t, bf16*) {}
static inline void pack_parts(const Vector*, int64_t, int64_t, bf16*) {}
static inline void amx_tile(const bf16*, int64_t, const Vectors&, float*, int64_t, Turn) {}
#endif

// Of each b's PARTS rows of y the sum, in row b.
static inline void join_parts(float* y, int64_t y_stride, int64_t count, int64_t columns) {
  for (int64_t b = 0; b < count; b++) {
    const float* from = y + PARTS * b * y_stride;
    for (int64_t i = 0; i < columns; i++)
      y[b * y_stride + i] = from[i] + (from[y_stride + i] + from[2 * y_stride + i]);
  }
}

// --- quantised ------------------------------------------------------------------------------

static inline float half_to_float(uint16_t half) {
  uint32_t magnitude = half & 0x7fff, bits = (magnitude << 13) + (112u << 23);
  float value;
  if (magnitude < 0x400) {  // subnormal
    value = float(magnitude) * 5.9604644775390625e-8f;
  } else {
    memcpy(&value, &bits, 4);
  }
  return half & 0x8000 ? -value : value;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Sixteen numbers, one an output of the tile.
struct Lanes {
  __m512 x;
};
struct Codes {  // four codes for each output
  __m512i x;
};
static inline Lanes zero_lanes() { return {_mm512_setzero_ps()}; }
static inline void store_lanes(float* p, Lanes a) { _mm512_storeu_ps(p, a.x); }
static inline Lanes load_halves(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Codes low_halves(Codes c) {
  return {_mm512_and_si512(c.x, _mm512_set1_epi8(15))};
}
static inline Codes high_halves(Codes c) {
  return {_mm512_and_si512(_mm512_srli_epi16(c.x, 4), _mm512_set1_epi8(15))};
}
struct Sums {
  __m512i x;
};
static inline Sums start_sums(int32_t value) { return {_mm512_set1_epi32(value)}; }
static inline void add_products(Sums& s, Codes c, int32_t four) {
#if defined(__AVX512VNNI__)
  s.x = _mm512_dpbusd_epi32(s.x, c.x, _mm512_set1_epi32(four));
#else
  const __m512i low = _mm512_set1_epi16(255), x = _mm512_set1_epi32(four);
  __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd = _mm512_srai_epi16(x, 8);
  s.x = _mm512_add_epi32(s.x, _mm512_madd_epi16(_mm512_and_si512(c.x, low), even));
  s.x = _mm512_add_epi32(s.x, _mm512_madd_epi16(_mm512_srli_epi16(c.x, 8), odd));
#endif
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  __m512 both = _mm512_mul_ps(weight_scale.x, _mm512_set1_ps(scale));
  total.x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s.x), both, total.x);
}
#elif defined(__AVX2__)
struct Lanes {
  __m256 low, high;
};
struct Codes {
  __m256i low, high;
};
static inline Lanes zero_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline void store_lanes(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
static inline Lanes load_halves(const uint16_t* p) {
#if defined(__F16C__)
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
#else
  alignas(32) float x[16];
  for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
  return {_mm256_load_ps(x), _mm256_load_ps(x + 8)};
#endif
}
static inline Codes load_codes(const uint8_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
static inline Codes low_halves(Codes c) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(c.low, mask), _mm256_and_si256(c.high, mask)};
}
static inline Codes high_halves(Codes c) {
  return low_halves({_mm256_srli_epi16(c.low, 4), _mm256_srli_epi16(c.high, 4)});
}
struct Sums {
  __m256i low, high;
};
static inline Sums start_sums(int32_t value) {
  return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}
static inline __m256i add_products(__m256i s, __m256i c, int32_t four) {
  const __m256i x = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(s, c, x);
#else
  __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
  __m256i even_codes = _mm256_and_si256(c, _mm256_set1_epi16(255));
  s = _mm256_add_epi32(s, _mm256_madd_epi16(even_codes, even));
  return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_srli_epi16(c, 8), odd));
#endif
}
static inline void add_products(Sums& s, Codes c, int32_t four) {
  s.low = add_products(s.low, c.low, four);
  s.high = add_products(s.high, c.high, four);
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  const __m256 by = _mm256_set1_ps(scale);
  __m256 low = _mm256_mul_ps(weight_scale.low, by), high = _mm256_mul_ps(weight_scale.high, by);
  total.low = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s.low), low), total.low);
  total.high = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s.high), high), total.high);
}
#else
struct Lanes {
  float x[TILE];
};
struct Codes {
  uint8_t x[TILE * 4];
};
static inline Lanes zero_lanes() { return {}; }
static inline void store_lanes(float* p, Lanes a) { memcpy(p, a.x, sizeof a.x); }
static inline Lanes load_halves(const uint16_t* p) {
  Lanes a;
  for (int i = 0; i < TILE; i++) a.x[i] = half_to_float(p[i]);
  return a;
}
static inline Codes load_codes(const uint8_t* p) {
  Codes c;
  memcpy(c.x, p, sizeof c.x);
  return c;
}
static inline Codes low_halves(Codes c) {
  for (uint8_t& x : c.x) x &= 15;
  return c;
}
static inline Codes high_halves(Codes c) {
  for (uint8_t& x : c.x) x >>= 4;
  return c;
}
struct Sums {
  int32_t x[TILE];
};
static inline Sums start_sums(int32_t value) {
  Sums s;
  for (int32_t& x : s.x) x = value;
  return s;
}
static inline void add_products(Sums& s, Codes c, int32_t four) {
  int8_t x[4];
  memcpy(x, &four, 4);
  for (int i = 0; i < TILE; i++)
    for (int j = 0; j < 4; j++) s.x[i] += int32_t(c.x[4 * i + j]) * x[j];
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  for (int i = 0; i < TILE; i++) total.x[i] += float(s.x[i]) * (weight_scale.x[i] * scale);
}
#endif

template <int BITS, int COUNT>
static void quantized_pass(const uint8_t* w, const uint16_t* scales, int64_t groups,
                           const Vector* x, float* out, Pass pass,
                           int64_t to_next) {
  constexpr int STEPS = BITS == 8 ? 8 : 4, SHIFT = BITS == 8 ? 7 : 3;  // codes lie around 2^SHIFT
  constexpr int64_t GROUP_BYTES = STEPS * 64;
  Lanes total[COUNT];
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) total[b] = zero_lanes();
  for (int64_t g = 0; g < groups; g++, w += GROUP_BYTES, scales += TILE) {
    const uint8_t* next = w + pass.ahead(g, to_next);
    Codes codes[8];
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++) {
      prefetch(next + j * 64);
      Codes read = load_codes(w + j * 64);
      if (BITS == 8) {
        codes[j] = read;
      } else {
        codes[2 * j] = low_halves(read);
        codes[2 * j + 1] = high_halves(read);
      }
    }
    Lanes weight_scale = load_halves(scales);
#pragma GCC unroll 8
    for (int b = 0; b < COUNT; b++) {
      Sums sums = start_sums(x[b].sums[g] * (1 << SHIFT));
      const int8_t* from = x[b].codes + g * GROUP;
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        int32_t four;
        memcpy(&four, from + 4 * j, 4);
        add_products(sums, codes[j], four);
      }
      add_scaled(total[b], sums, weight_scale, x[b].scales[g]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) store_lanes(out + b * TILE, total[b]);
}

template <int BITS>
static void quantized_tile(const uint8_t* w, const uint16_t* scales, int64_t groups,
                           const Vector* x, int64_t count, float* out, int64_t to_next,
                           Turn turn) {
  in_passes<8>(count, turn, [&](Pass pass, auto constant) {
    quantized_pass<BITS, decltype(constant)::value>(w, scales, groups, x + pass.first,
                                                    out + pass.first * TILE, pass, to_next);
  });
}

// One tile of outputs for each vector: out[b * 16 + row]. What lies beyond the last row is
// unspecified. The tile is read from memory once, and meanwhile the one at `next` is asked for, or
// of it what falls to this turn.
static void tile_product(const Matrix& m, int64_t tile, const Vectors& x, float* out,
                         const void* next = nullptr, Turn turn = {}) {
  const int64_t rows = std::min<int64_t>(TILE, m.rows - tile * TILE), groups = m.groups();
  const uint8_t* values = m.tile(tile);
  const int64_t to_next = next ? static_cast<const uint8_t*>(next) - values : 0;
  if (m.kind == FP32)
    return float_tile<float>(values, rows, m.columns, x.each, x.count, out, to_next, turn);
  if (m.kind == BF16) {
    if (x.parts && rows == TILE)
      return amx_tile(reinterpret_cast<const bf16*>(values), m.columns, x, out, to_next, turn);
    return float_tile<bf16>(values, rows, m.columns, x.each, x.count, out, to_next, turn);
  }
  const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + tile * groups * TILE;
  if (m.kind == INT8)
    return quantized_tile<8>(values, scales, groups, x.each, x.count, out, to_next, turn);
  quantized_tile<4>(values, scales, groups, x.each, x.count, out, to_next, turn);
}

// Round n numbers, padded with zeros, for a quantised matrix; `Vector` says what is what. A group
// that holds NaN or infinity gets the scale NaN.
static inline void quantize(const float* x, int64_t n, int8_t* codes, float* scales,
                            int32_t* sums) {
  typedef int8_t bytes __attribute__((vector_size(LANES)));
  const ivec no_sign = ivec{} + 0x7fffffff;
  for (int64_t g = 0; g * GROUP < n; g++, x += GROUP, codes += GROUP) {
    vec largest = {}, damage = {};
    for (int i = 0; i < GROUP; i += LANES) {
      vec here = load(x + i), size = (vec)((ivec)here & no_sign);
      largest = size > largest ? size : largest;
      damage += here * vec{};  // NaN for what is not finite
    }
    float most = 0.f;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    const vec inverse = splat(most > 0.f ? 127.f / most : 0.f);
    const vec shift = splat(12582912.f);  // 1.5 2^23: adding it rounds to a whole number
    ivec total = {};
    for (int i = 0; i < GROUP; i += LANES) {
      vec rounded = (load(x + i) * inverse + shift);
      ivec code = (ivec)rounded - (ivec)shift;
      total += code;
      const bytes narrow = __builtin_convertvector(code, bytes);
      memcpy(codes + i, &narrow, sizeof narrow);
    }
    int32_t all = 0;
    for (int i = 0; i < LANES; i++) all += total[i];
    scales[g] = most / 127.f + sum(damage);
    sums[g] = -all;
  }
}

// Some vectors of columns of y[b] += sum over `rows` of c[b][r] W[r], for COUNT of the b.
template <class W, int COUNT, int VECS>
static inline void add_columns(const W* w, int64_t rows, int64_t row_stride, const float* c,
                               int64_t c_stride, float* y, int64_t y_stride, Pass pass,
                               int64_t to_next) {
  vec total[COUNT][VECS];
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) total[b][j] = load(y + b * y_stride + j * LANES);
  for (int64_t r = 0; r < rows; r++, w += row_stride) {
    const char* ahead = reinterpret_cast<const char*>(w) + pass.ahead(r, to_next);
    vec left[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      if (j * LANES * sizeof(W) % 64 == 0) prefetch(ahead + j * LANES * sizeof(W));
      left[j] = load(w + j * LANES);
    }
#pragma GCC unroll 8
    for (int b = 0; b < COUNT; b++) {
      const vec by = splat(c[b * c_stride + r]);
#pragma GCC unroll 8
      for (int j = 0; j < VECS; j++) total[b][j] += left[j] * by;
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) store(y + b * y_stride + j * LANES, total[b][j]);
}

// y[b][0..columns) += sum over `rows` of c[b][r] W[r][0..columns), for a W that is not quantised;
// meanwhile what lies `to_next` bytes further is asked for.
template <class W>
static void add_rows(const W* w, int64_t rows, int64_t columns, int64_t row_stride,
                     const float* c, int64_t c_stride, int64_t count, float* y,
                     int64_t y_stride, int64_t to_next, Turn turn = {}) {
  in_passes<8>(count, turn, [&](Pass pass, auto constant) {
    constexpr int N = decltype(constant)::value, WIDE = N <= 2 ? 8 : N <= 6 ? 4 : 2;
    const float* by = c + pass.first * c_stride;
    float* to = y + pass.first * y_stride;
    int64_t k = 0;
    for (; k + WIDE * LANES <= columns; k += WIDE * LANES)
      add_columns<W, N, WIDE>(w + k, rows, row_stride, by, c_stride, to + k, y_stride, pass,
                              to_next);
    for (; k + LANES <= columns; k += LANES)
      add_columns<W, N, 1>(w + k, rows, row_stride, by, c_stride, to + k, y_stride, pass, to_next);
    for (; k < columns; k++)
      for (int64_t b = 0; b < N; b++)
        for (int64_t r = 0; r < rows; r++)
          to[b * y_stride + k] += by[b * c_stride + r] * to_float(w[r * row_stride + k]);
  });
}
