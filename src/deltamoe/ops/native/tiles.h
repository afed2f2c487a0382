// Products in AMX's tiles of operands that already are bf16, in the layout the tiles want.
//
//   C[m, n] = sum_k A[m, k] B[k, n]
//
// A's rows are contiguous. B holds two neighbouring k side by side: element (k, n) stands at
// b[k / 2 * ldb + 2 n + k % 2]. M and N are multiples of 16, K of 32 (pad with zeros).
#pragma once

#include "gemm_bf16.h"

#if HAS_TILES

// A stretch of the sum over k: its own columns of A and rows of B.
struct Stretch {
  const bf16* a;
  ptrdiff_t lda;
  const bf16* b;
  int64_t depth;
};

template <int HIGH, int WIDE>  // C's block in tiles
static inline void amx_block(const Stretch* stretches, int64_t count, ptrdiff_t ldb, int64_t m,
                             int64_t n, float* c, ptrdiff_t ldc, bool adds) {
  const ptrdiff_t row = ldc * sizeof(float);
  before_tile_loads();
  if (adds) {
    _tile_loadd(0, c, row);
    if constexpr (WIDE > 1) _tile_loadd(1, c + 16, row);
    if constexpr (HIGH > 1) _tile_loadd(2, c + 16 * ldc, row);
    if constexpr (HIGH > 1 && WIDE > 1) _tile_loadd(3, c + 16 * ldc + 16, row);
  } else {
    _tile_zero(0);
    if constexpr (WIDE > 1) _tile_zero(1);
    if constexpr (HIGH > 1) _tile_zero(2);
    if constexpr (HIGH > 1 && WIDE > 1) _tile_zero(3);
  }
  for (const Stretch* s = stretches; s < stretches + count; s++) {
    const bf16* a = s->a + m * s->lda;
    const bf16* b = s->b + 2 * n;
    for (int64_t k = 0; k < s->depth; k += 32) {
      const bf16* right = b + k / 2 * ldb;
      _tile_loadd(6, right, ldb * sizeof(bf16));
      if constexpr (WIDE > 1) _tile_loadd(7, right + 32, ldb * sizeof(bf16));
      _tile_loadd(4, a + k, s->lda * sizeof(bf16));
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (WIDE > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (HIGH > 1) {
        _tile_loadd(5, a + 16 * s->lda + k, s->lda * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (WIDE > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, row);
  if constexpr (WIDE > 1) _tile_stored(1, c + 16, row);
  if constexpr (HIGH > 1) _tile_stored(2, c + 16 * ldc, row);
  if constexpr (HIGH > 1 && WIDE > 1) _tile_stored(3, c + 16 * ldc + 16, row);
}

// C [M, N], or C plus the sum with ``adds``.
static inline void amx_gemm(int64_t M, int64_t N, const Stretch* stretches, int64_t count,
                            ptrdiff_t ldb, float* c, ptrdiff_t ldc, bool adds) {
  for (int64_t m = 0; m < M; m += 32)
    for (int64_t n = 0; n < N; n += 32) {
      float* at = c + m * ldc + n;
      const bool high = m + 16 < M, wide = n + 16 < N;
      auto block = high ? (wide ? amx_block<2, 2> : amx_block<2, 1>)
                        : (wide ? amx_block<1, 2> : amx_block<1, 1>);
      block(stretches, count, ldb, m, n, at, ldc, adds);
    }
}

#endif
