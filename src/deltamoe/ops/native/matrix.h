// Matrices as models hold them, the vectors that multiply them, and how those are taken together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vector.h"

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
