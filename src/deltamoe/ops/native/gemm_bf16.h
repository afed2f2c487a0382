// The products of gemm.h with operands rounded to bf16 and sums in fp32, on AMX's tiles.
//
// Operands are fp32 and are packed on the way: an M x K by K x N product rounds and moves M K + K N
// numbers, which costs little beside its M N K multiplications. M and N are multiples of 16.
// Where a machine has no AMX, or the system does not grant it, `amx_granted()` is false.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
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

// While it lives, this thread's tiles are eight of 16 rows of 64 bytes.
class Tiles {
 public:
  explicit Tiles(bool wanted) : configured_(wanted) {
    if (!wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic names the first 8 bytes only
    _tile_loadconfig(&config);
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

// Of two rows of 16 numbers: (first[0], second[0], first[1], second[1], ...) in bf16.
static inline __m512i bf16_pairs(vec first, vec second) {
  const __m512i in_turn = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
      19, 3, 18, 2, 17, 1, 16, 0);
  __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return _mm512_permutexvar_epi16(in_turn, (__m512i)both);
}

// bf16 numbers an operand takes: `lines` rows or columns, and the terms filled up to 32.
static inline size_t packed_size(size_t lines, size_t terms) {
  return lines * ((terms + 31) / 32 * 32);
}

// A [M, K] to rows of bf16, filled up with zeros; times `sign`.
static void pack_left(int M, int K, Strided a, float sign, bf16* to) {
  const int width = (K + 31) / 32 * 32;
  const vec by = splat(sign);
  if (a.column == 1) {
    for (int m = 0; m < M; m++)
      for (int k = 0; k < width; k += 32) {
        const float* from = a.p + m * a.row + k;
        vec low = load(from) * by, high = k + 16 < K ? load(from + 16) * by : vec{};
        _mm512_storeu_si512(to + m * width + k,
                            (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
    return;
  }
  // Columns lie together: pair them, then turn squares of 16 pairs.
  alignas(64) float pairs[16 * 16];
  for (int k = 0; k < width; k += 32)
    for (int m = 0; m < M; m += 16) {
      for (int i = 0; i < 16; i++) {
        const float* from = a.p + (k + 2 * i) * a.column + m;
        vec first = k + 2 * i < K ? load(from) * by : vec{};
        vec second = k + 2 * i + 1 < K ? load(from + a.column) * by : vec{};
        _mm512_store_si512(pairs + 16 * i, bf16_pairs(first, second));
      }
      transpose_square(pairs, 16, reinterpret_cast<float*>(to + m * width + k), width / 2);
    }
}

// B [K, N] to tiles of 16 pairs of rows and 16 columns, K's tiles outermost.
static void pack_right(int N, int K, const float* b, ptrdiff_t ldb, bf16* to) {
  for (int k = 0; k < K; k += 32)
    for (int n = 0; n < N; n += 16)
      for (int i = 0; i < 16; i++, to += 32) {
        const float* from = b + (k + 2 * i) * ldb + n;
        vec first = k + 2 * i < K ? load(from) : vec{};
        vec second = k + 2 * i + 1 < K ? load(from + ldb) : vec{};
        _mm512_storeu_si512(to, bf16_pairs(first, second));
      }
}

// x * y * sign, and * by[row] if given, as pack_left packs it; x and y [M, K] without gaps.
static inline void pack_product(int M, int K, const float* x, const float* y, const float* by,
                                float sign, bf16* to) {
  const int width = (K + 31) / 32 * 32;
  for (int m = 0; m < M; m++, x += K, y += K, to += width) {
    const vec scale = splat(by ? sign * by[m] : sign);
    for (int k = 0; k < width; k += 32) {
      vec low = load(x + k) * load(y + k) * scale;
      vec high = k + 16 < K ? load(x + k + 16) * load(y + k + 16) * scale : vec{};
      _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
  }
}

// The same as pack_right of `rows` [N, K] transposed, which pack_left has made.
static inline void pack_turned(int N, int K, const bf16* rows, bf16* to) {
  const int width = (K + 31) / 32 * 32;  // two terms move as one fp32 number
  for (int k = 0; k < width; k += 32)
    for (int n = 0; n < N; n += 16, to += 512)
      transpose_square(reinterpret_cast<const float*>(rows + n * width + k), width / 2,
                       reinterpret_cast<float*>(to), 16);
}

// One or two tiles of C each way; a and b are packed, with `width` terms a row of A and `columns`
// of B.
template <bool adds, int ROWS, int COLUMNS>
static inline void tile_product(int depth, const bf16* a, int width, const bf16* b, int columns,
                                float* c, ptrdiff_t ldc) {
  const ptrdiff_t a_row = width * 2, c_row = ldc * 4;
  const ptrdiff_t b_step = ptrdiff_t(columns) * 32;  // from one tile of terms to the next
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
  for (int k = 0; k < depth; k += 32, b += b_step) {
    _tile_loadd(4, a + k, a_row);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (COLUMNS == 2) {
      _tile_loadd(7, b + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS == 2) {
      _tile_loadd(5, a + 16 * width + k, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if (COLUMNS == 2) _tile_stored(1, c + 16, c_row);
  if (ROWS == 2) _tile_stored(2, c + 16 * ldc, c_row);
  if (ROWS == 2 && COLUMNS == 2) _tile_stored(3, c + 16 * ldc + 16, c_row);
}

// C = A B or C += A B with packed operands, over `depth` terms: a multiple of 32.
template <bool adds>
static void gemm_packed(int M, int N, int depth, const bf16* a, int width, const bf16* b,
                        int columns, float* c, ptrdiff_t ldc) {
  for (int n = 0; n < N; n += 32)
    for (int m = 0; m < M; m += 32) {
      const bool high = m + 16 < M, wide = n + 16 < N;
      auto block = high ? (wide ? tile_product<adds, 2, 2> : tile_product<adds, 2, 1>)
                        : (wide ? tile_product<adds, 1, 2> : tile_product<adds, 1, 1>);
      block(depth, a + m * width, width, b + n * 32, columns, c + m * ldc + n, ldc);
    }
}

// As `gemm`; `room` holds both packed operands.
template <Into into>
static void gemm_bf16(int M, int N, int K, Strided a, const float* b, ptrdiff_t ldb, float* c,
                      ptrdiff_t ldc, bf16* room, const float* scale = nullptr) {
  bf16* right = room + packed_size(M, K);
  pack_left(M, K, a, into == Into::SUB ? -1.f : 1.f, room);
  pack_right(N, K, b, ldb, right);
  if (into == Into::SCALE_ADD)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n += LANES)
        store(c + m * ldc + n, load(c + m * ldc + n) * splat(scale[m]));
  const int width = (K + 31) / 32 * 32;
  gemm_packed<into != Into::SET>(M, N, width, room, width, right, N, c, ldc);
}

#else
static inline bool amx_granted() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
static inline size_t packed_size(size_t, size_t) { return 0; }
static inline void pack_left(int, int, Strided, float, bf16*) {}
static inline void pack_right(int, int, const float*, ptrdiff_t, bf16*) {}
static inline void pack_product(int, int, const float*, const float*, const float*, float, bf16*) {}
static inline void pack_turned(int, int, const bf16*, bf16*) {}
template <bool adds>
static void gemm_packed(int, int, int, const bf16*, int, const bf16*, int, float*, ptrdiff_t) {}
template <Into into>
static void gemm_bf16(int M, int N, int K, Strided a, const float* b, ptrdiff_t ldb, float* c,
                      ptrdiff_t ldc, bf16*, const float* scale = nullptr) {
  gemm<into>(M, N, K, a, b, ldb, c, ldc, scale);
}
#endif
