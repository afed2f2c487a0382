// Products of long rows with matrices, on AMX's tiles: the rows are rounded as they lie and stand
// left; a matrix stands right, 32 of its columns at a time ("a slice"), packed where it is needed.
// What comes out is rows again, 32 x 32 numbers at a time.
#pragma once

#include "buffer.h"
#include "gemm_bf16.h"

#if HAS_TILES

namespace {

constexpr int64_t UNIT = 16, SLICE = 32;

// A row's place among others: an odd number of the cache's lines, which so use all its sets.
inline int64_t odd_row(int64_t width) { return up_to(width, SLICE) | SLICE; }

inline __mmask32 first(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// Up to 32 numbers, rounded, and zeros.
inline __m512i line(const bf16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(first(count), from);
}
inline __m512i line(const float* from, int64_t count) {
  const __mmask32 mask = first(count);
  return bf16_both((vec)_mm512_maskz_loadu_ps(__mmask16(mask), from),
                   (vec)_mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16));
}
inline __m512i line(const float* both) { return bf16_both(load(both), load(both + UNIT)); }

// Two terms of 32 columns to their place in two neighbouring tiles.
inline void pair_up(__m512i term, __m512i next, bf16* to) {
  _mm512_storeu_si512(to, in_turn(_mm512_shuffle_i64x2(term, next, 0x44)));
  _mm512_storeu_si512(to + 512, in_turn(_mm512_shuffle_i64x2(term, next, 0xee)));
}

// Half a step of a slice: 16 terms, which are rows of `from`, or as many as there are.
template <class W>
void pack_terms(const W* from, int64_t row, int64_t terms, int64_t columns, bf16* to) {
  const auto term = [&](int64_t k) {
    return k < terms ? line(from + k * row, columns) : _mm512_setzero_si512();
  };
  for (int64_t k = 0; k < UNIT; k += 2, to += 32) pair_up(term(k), term(k + 1), to);
}

// Half a slice: 16 columns, which are rows of `from`, or as many as there are.
template <class W>
void pack_lines(const W* from, int64_t row, int64_t columns, int64_t terms, bf16* to) {
  alignas(64) float square[16 * 16];  // of pairs
  for (int64_t k = 0; k < terms; k += 32, to += 1024) {
    for (int64_t n = 0; n < UNIT; n++)
      _mm512_store_si512(square + 16 * n, n < columns ? line(from + n * row + k, terms - k)
                                                      : _mm512_setzero_si512());
    transpose_square(square, 16, reinterpret_cast<float*>(to), 16);
  }
}

// All rows times a slice; give(row, block) gets each row's 32 numbers.
template <class Give>
void times_slice(int64_t rows, const bf16* left, int64_t width, const bf16* slice, int64_t depth,
                 int64_t columns, Give give) {
  alignas(64) float block[SLICE * SLICE];
  for (int64_t m = 0; m < rows; m += SLICE) {
    const int64_t here = rows - m < SLICE ? rows - m : SLICE;
    gemm_packed<false>(int(up_to(here, UNIT)), columns > UNIT ? 32 : 16, int(up_to(depth, 32)),
                       left + m * width, int(width), slice, SLICE, block, SLICE);
    for (int64_t r = 0; r < here; r++) give(m + r, block + r * SLICE);
  }
}

// Rows as the terms of a product's right side: pairs of them in turn, `wide` columns (a multiple of
// 32) of which there are `columns`. row(r) is where one begins.
template <class Row>
void pair_rows(int64_t rows, int64_t columns, int64_t wide, Row row, bf16* to) {
  constexpr int64_t AHEAD = 8;
  for (int64_t r = 0; r < up_to(rows, 32); r += 2) {
    const auto *term = row(r < rows ? r : 0), *next = row(r + 1 < rows ? r + 1 : 0);
    const int64_t here = r < rows ? columns : 0, there = r + 1 < rows ? columns : 0;
    for (int64_t i = r + AHEAD; i < r + AHEAD + 2 && i < rows; i++)
      prefetch(row(i), columns * sizeof(*term));
    for (int64_t c = 0; c < wide; c += 32)
      pair_up(line(term + c, here - c), line(next + c, there - c),
              to + r / 32 * 32 * wide + c * 32 + r % 32 * 16);
  }
}

// Rows as the columns of a product's left side: to[channel * to_row + r], with zeros for channels
// up to a multiple of 16 and rows up to one of 32.
inline void turn_rows(int64_t rows, int64_t channels, const bf16* from, int64_t row, bf16* to,
                      int64_t to_row) {
  const auto half = [&](int64_t r, int64_t m) {
    return _mm256_maskz_loadu_epi16(r < rows ? __mmask16(first(channels - m)) : 0,
                                    from + r * row + m);
  };
  const auto pairs = [&](int r, int m) {
    return in_turn(_mm512_inserti64x4(_mm512_castsi256_si512(half(r, m)), half(r + 1, m), 1));
  };
  pack_columns(int(up_to(channels, UNIT)), int(up_to(rows, 32)), pairs, to, int(to_row));
}

}  // namespace

#endif
