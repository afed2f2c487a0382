// Products of bf16 matrices with a few vectors on AMX's tiles.
//
// Tiles multiply bf16 numbers and sum in fp32. The weights are such numbers; a vector's are cut
// into three, of 8 bits each, so that every product is as exact as the vector: PARTS columns of the
// right side stand for one vector, and do not know of those beside them. Where weights are summed
// (`add_parts`), they stand right, and PARTS terms for a number.
#pragma once

#include "gemm_bf16.h"
#include "matrix.h"

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

// What is to be asked for meanwhile: as many bytes from here on.
struct Ahead {
  const char* from;
  int64_t bytes;

  Ahead part(int64_t i, int64_t of) const { return {from + bytes / of * i, bytes / of}; }
  void ask() const { prefetch(from, size_t(bytes)); }
};

// 32 rows of a matrix, and what multiplies them.
struct PartRows {
  const bf16* w;
  int64_t columns;
  const bf16* parts;
  Ahead ahead;
};

// Sums of rows of weights for `count` vectors come in groups of as many rows as need the fewest
// tiles.
static inline int64_t part_groups(int64_t count) { return (count + TILE - 1) / TILE; }
static inline int64_t part_rows(int64_t count) {
  return (count + part_groups(count) - 1) / part_groups(count);
}

#if HAS_TILES
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
static inline void pack_parts(const Vector* x, int64_t count, int64_t columns, bf16* to) {
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
#define EACH_TILE(DO)               \
  DO(0)                             \
  if constexpr (WIDE > 1) { DO(1) } \
  if constexpr (WIDE > 2) { DO(2) } \
  if constexpr (WIDE > 3) { DO(3) } \
  if constexpr (WIDE > 4) { DO(4) } \
  if constexpr (WIDE > 5) { DO(5) }
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

static inline void amx_tile(const bf16* w, int64_t columns, const Vectors& x, float* out,
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

// 32 rows of one matrix, or of some that stand side by side, times vectors so few that their parts
// fill one tile: to[b * stride + row]. The first three tiles are left alone.
static inline void multiply_two_tiles(const PartRows* of, int64_t count, int64_t vectors,
                                      float* to, int64_t stride) {
  alignas(64) float products[2][TILE * TILE];
  before_tile_loads();
  _tile_zero(3);
  _tile_zero(4);
  for (const PartRows* p = of; p < of + count; p++) {
    const int64_t row = p->columns * sizeof(bf16);
    for (int64_t k = 0; k < p->columns; k += 32) {
      p->ahead.part(k / 32, p->columns / 32).ask();
      _tile_loadd(7, p->parts + k * TILE, 64);
      _tile_loadd(5, p->w + k, row);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(6, p->w + TILE * p->columns + k, row);
      _tile_dpbf16ps(4, 6, 7);
    }
  }
  _tile_stored(3, products[0], 64);
  _tile_stored(4, products[1], 64);
  for (int n = 0; n < 2; n++) {
    transpose_square(products[n], TILE, products[n], TILE);
    const float* from = products[n];
    for (int64_t b = 0; b < vectors; b++, from += PARTS * TILE)
      store(to + b * stride + n * TILE, load(from) + (load(from + TILE) + load(from + 2 * TILE)));
  }
}

// y[b][0..columns) += sum over 32 rows of c[b][r] W[r][0..columns); a number's parts are terms.
// There are `part_groups` of y's rows, of `part_rows` each: the first three tiles have as many.
// `room` is for PARTS * 32 numbers a row; columns are a multiple of 32.
static inline void add_parts(const bf16* w, int64_t columns, const float* c, int64_t c_stride,
                             int64_t count, float* y, int64_t y_stride, Ahead ahead, bf16* room) {
  const int64_t groups = part_groups(count), rows = part_rows(count);
  const int64_t part = rows * 32, y_row = y_stride * sizeof(float);
  std::fill(room, room + groups * PARTS * part, bf16{});
  for (int64_t b = 0; b < count; b++)
    split(c + b * c_stride, room + b / rows * PARTS * part + b % rows * 32, part);
  alignas(64) int16_t places[32];
  for (int i = 0; i < 32; i++) places[i] = i / 2 + i % 2 * 32;
  const __m512i low = _mm512_load_si512(places);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  // of rows, for 16 columns and for the next; packed well before they are loaded as tiles
  alignas(64) bf16 pairs[2][2][TILE][32];
  const auto pack = [&](int64_t k) {
    auto& to = pairs[k / 32 % 2];
#pragma GCC unroll 16
    for (int64_t i = 0; i < TILE; i++) {
      const bf16* from = w + 2 * i * columns + k;
      const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + columns);
      _mm512_store_si512(to[0][i], _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to[1][i], _mm512_permutex2var_epi16(a, high, b));
    }
  };
  pack(0);
  for (int64_t k = 0; k < columns; k += 32) {
    ahead.part(k / 32, columns / 32).ask();
    if (k + 32 < columns) pack(k + 32);
    before_tile_loads();
    _tile_loadd(3, pairs[k / 32 % 2][0], 64);
    _tile_loadd(4, pairs[k / 32 % 2][1], 64);
    for (int64_t m = 0; m < groups; m++) {
      float* to = y + m * rows * y_stride + k;
      const bf16* parts = room + m * PARTS * part;
      _tile_loadd(0, to, y_row);
      _tile_loadd(1, to + TILE, y_row);
      for (int64_t p = 0; p < PARTS; p++, parts += part) {
        _tile_loadd(2, parts, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, to, y_row);
      _tile_stored(1, to + TILE, y_row);
    }
  }
}
#else
static inline void pack_parts(const Vector*, int64_t, int64_t, bf16*) {}
static inline void amx_tile(const bf16*, int64_t, const Vectors&, float*, int64_t, Turn) {}
static inline void multiply_two_tiles(const PartRows*, int64_t, int64_t, float*, int64_t) {}
static inline void add_parts(const bf16*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                             Ahead, bf16*) {}
#endif
