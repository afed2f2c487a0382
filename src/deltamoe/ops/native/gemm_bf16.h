// The products of gemm.h with operands rounded to bf16 and sums in fp32, on AMX's tiles.
//
// Operands are packed first, from fp32 or from rows of bf16: an M x K by K x N product rounds and
// moves M K + K N numbers. M and N are multiples of 16.
// Where a machine has no AMX, or the system does not grant it, `amx_granted()` is false.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// The tiles' state is large; Linux gives it to a process that asks.
static inline bool amx_granted() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted =
      syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
}

// This thread's tiles become rows of 64 bytes: the first three `low` of them, the others 16.
static inline void configure_tiles(int low = 16) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = uint8_t(i < 3 ? low : 16);
  asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic names the first 8 bytes only
  _tile_loadconfig(&config);
}

// While it lives, this thread's tiles are eight of 16 rows of 64 bytes.
class Tiles {
 public:
  explicit Tiles(bool wanted) : configured_(wanted) {
    if (wanted) configure_tiles();
  }
  ~Tiles() {
    if (configured_) _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  bool configured_;
};

// What follows may load tiles from all that was stored so far: GCC's intrinsic does not say so.
static inline void before_tile_loads() { asm volatile("" : : : "memory"); }

// Two rows of 16 numbers in bf16, one behind the other.
static inline __m512i bf16_both(vec first, vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// Of such rows: (first[0], second[0], first[1], second[1], ...).
static inline __m512i in_turn(__m512i both) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
      19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}
static inline __m512i bf16_pairs(vec first, vec second) {
  return in_turn(bf16_both(first, second));
}

// Rows of columns that are to be terms: pairs(k, m) of numbers m to m + 15 of the rows k and k + 1
// go to row m of `to`, whose rows are `width` terms apart. M is a multiple of 16, K of 32.
template <class Pairs>
static inline void pack_columns(int M, int K, Pairs pairs, bf16* to, int width) {
  alignas(64) float square[16 * 16];  // of pairs
  for (int k = 0; k < K; k += 32)
    for (int m = 0; m < M; m += 16) {
      for (int i = 0; i < 16; i++) _mm512_store_si512(square + 16 * i, pairs(k + 2 * i, m));
      transpose_square(square, 16, reinterpret_cast<float*>(to + m * width + k), width / 2);
    }
}

// A [M, K] to rows of bf16, filled up with zeros.
static inline void pack_left(int M, int K, Strided a, bf16* to) {
  const int width = (K + 31) / 32 * 32;
  if (a.column == 1) {
    for (int m = 0; m < M; m++)
      for (int k = 0; k < width; k += 32) {
        const float* from = a.p + m * a.row + k;
        const vec low = load(from), high = k + 16 < K ? load(from + 16) : vec{};
        _mm512_storeu_si512(to + m * width + k,
                            (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
    return;
  }
  const auto pairs = [&](int k, int m) {
    const float* from = a.p + k * a.column + m;
    return bf16_pairs(k < K ? load(from) : vec{}, k + 1 < K ? load(from + a.column) : vec{});
  };
  pack_columns(M, width, pairs, to, width);
}

// The same of bf16 rows [K, M], `row` numbers apart.
static inline void pack_left_turned(int M, int K, const bf16* rows, int row, bf16* to) {
  const auto half = [&](int k, int m) {
    return k < K ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + k * row + m))
                 : _mm256_setzero_si256();
  };
  const auto pairs = [&](int k, int m) {
    return in_turn(_mm512_inserti64x4(_mm512_castsi256_si512(half(k, m)), half(k + 1, m), 1));
  };
  const int width = (K + 31) / 32 * 32;
  pack_columns(M, width, pairs, to, width);
}

// What stands right of a product are terms [K, N] as tiles of 16 pairs of terms and 16 columns, K's
// tiles outermost.

// Two terms of 32 columns to their place there and, times `sign` (1 or -1), to rows as pack_left has
// them, `width` terms apart, if there are any: past the caches if nothing reads them soon.
template <bool streams>
static inline void pack_two(vec low, vec high, vec next_low, vec next_high, bf16* right, bf16* row,
                            int width, int sign = 1) {
  const __m512i lows = bf16_both(low, next_low), highs = bf16_both(high, next_high);
  _mm512_storeu_si512(right, in_turn(lows));
  _mm512_storeu_si512(right + 512, in_turn(highs));
  if (!row) return;
  const __m512i flips = _mm512_set1_epi16(sign < 0 ? int16_t(0x8000) : 0);
  const auto keep = [&](bf16* to, __m512i line) {
    line = _mm512_xor_si512(line, flips);
    if (streams) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    else _mm512_storeu_si512(to, line);
  };
  keep(row, _mm512_shuffle_i64x2(lows, highs, 0x44));
  keep(row + width, _mm512_shuffle_i64x2(lows, highs, 0xee));
}

// Terms [K, N] both ways; K and N are multiples of 32, `rows` may be null.
template <bool streams>
static inline void pack_both(int N, int K, const float* b, bf16* to, bf16* rows, int sign = 1) {
  for (int k = 0; k < K; k += 2)
    for (int n = 0; n < N; n += 32) {
      const float *from = b + k * N + n, *next = from + N;
      bf16* row = rows ? rows + k * N + n : nullptr;
      pack_two<streams>(load(from), load(from + 16), load(next), load(next + 16),
                        to + k / 32 * 32 * N + n * 32 + k % 32 * 16, row, N, sign);
    }
}

// Rows [N, K] as pack_left makes them, transposed to what stands right.
static inline void pack_turned(int N, int K, const bf16* rows, bf16* to) {
  const int width = (K + 31) / 32 * 32;  // two terms move as one fp32 number
  for (int k = 0; k < width; k += 32)
    for (int n = 0; n < N; n += 16, to += 512)
      transpose_square(reinterpret_cast<const float*>(rows + n * width + k), width / 2,
                       reinterpret_cast<float*>(to), 16);
}

// `depth` terms of a product, a multiple of 32: packed, with `width` terms a row of A and `columns`
// of B.
struct Terms {
  int depth;
  const bf16* a;
  int width;
  const bf16* b;
  int columns;
};

// One or two tiles of C each way: the sum of some products.
template <bool adds, int ROWS, int COLUMNS>
static inline void block_product(const Terms* products, int count, float* c, ptrdiff_t ldc) {
  const ptrdiff_t c_row = ldc * 4;
  before_tile_loads();
  if (adds) {
    _tile_loadd(0, c, c_row);
    if (COLUMNS == 2) _tile_loadd(1, c + 16, c_row);
    if (ROWS == 2) _tile_loadd(2, c + 16 * ldc, c_row);
    if (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, c + 16 * ldc + 16, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const Terms* p = products; p < products + count; p++) {
    const ptrdiff_t a_row = p->width * 2, b_step = ptrdiff_t(p->columns) * 32;
    const bf16 *a = p->a, *b = p->b;
    for (int k = 0; k < p->depth; k += 32, b += b_step) {
      _tile_loadd(4, a + k, a_row);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (COLUMNS == 2) {
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (ROWS == 2) {
        _tile_loadd(5, a + 16 * p->width + k, a_row);
        _tile_dpbf16ps(2, 5, 6);
        if (COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_row);
  if (COLUMNS == 2) _tile_stored(1, c + 16, c_row);
  if (ROWS == 2) _tile_stored(2, c + 16 * ldc, c_row);
  if (ROWS == 2 && COLUMNS == 2) _tile_stored(3, c + 16 * ldc + 16, c_row);
}

// C = A B or C += A B with packed operands, over `depth` terms: a multiple of 32.
template <bool adds>
static inline void gemm_packed(int M, int N, int depth, const bf16* a, int width, const bf16* b,
                               int columns, float* c, ptrdiff_t ldc) {
  for (int n = 0; n < N; n += 32)
    for (int m = 0; m < M; m += 32) {
      const bool high = m + 16 < M, wide = n + 16 < N;
      auto block = high ? (wide ? block_product<adds, 2, 2> : block_product<adds, 2, 1>)
                        : (wide ? block_product<adds, 1, 2> : block_product<adds, 1, 1>);
      const Terms terms{depth, a + m * width, width, b + n * 32, columns};
      block(&terms, 1, c + m * ldc + n, ldc);
    }
}

#else
static inline bool amx_granted() { return false; }
static inline void configure_tiles(int = 16) {}
struct Tiles {
  explicit Tiles(bool) {}
};
#endif
