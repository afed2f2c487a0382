// Products of a matrix with a few vectors, which read the matrix once: y[b] = W x[b].
//
// W is fp32 or bf16, row by row as PyTorch has it, or quantised in the layout of ops/quantized.
// Work is cut into tiles of 16 neighbouring outputs. A number of a result is summed in the same
// order whatever the number of vectors beside it, and whichever thread has its tile.
#pragma once

#include <cstring>

#include "matvec_parts.h"
#include "matvec_quantized.h"

template <class W>
static inline vec load_some(const W* p, int64_t count) {  // 0 < count < LANES; zeros behind
  W room[LANES] = {};
  memcpy(room, p, count * sizeof(W));
  return load_wide(room);
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
      for (int r = 0; r < ROWS; r++) left[r] = load_wide(w + r * columns + i);
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
      vec left = rest < LANES ? load_some(at, rest) : load_wide(at);
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
      left[j] = load_wide(w + j * LANES);
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
