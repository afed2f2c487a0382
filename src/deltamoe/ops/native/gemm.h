// Small matrix products in fp32 whose operands lie in this core's cache.
//
//   C[m, n] = scale * C[m, n] + sign * sum_k A[m, k] B[k, n]
//
// A is read one number at a time, with any strides, so A transposed costs nothing. B and C are
// read by whole vectors: their rows are contiguous and N is a multiple of LANES (pad with zeros).
#pragma once

#include <cstddef>
#include <type_traits>

#include "vector.h"

// How C enters: SET overwrites it, ADD and SUB accumulate, SCALE_ADD first multiplies row m of C
// by scale[m].
enum class Into { SET, ADD, SUB, SCALE_ADD };

struct Strided {  // element (m, k) is at p[m * row + k * column]
  const float* p;
  ptrdiff_t row, column;
};

template <Into into, int ROWS, int VECS>
static inline __attribute__((always_inline)) void gemm_tile(
    int depth, Strided a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc,
    const float* scale) {
  vec total[ROWS][VECS] = {};
  for (int k = 0; k < depth; k++) {
    vec right[VECS];
    for (int j = 0; j < VECS; j++) right[j] = load(b + k * ldb + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      vec left = splat(a.p[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < VECS; j++) total[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      float* at = c + i * ldc + j * LANES;
      if (into == Into::SET) store(at, total[i][j]);
      if (into == Into::ADD) store(at, load(at) + total[i][j]);
      if (into == Into::SUB) store(at, load(at) - total[i][j]);
      if (into == Into::SCALE_ADD) store(at, load(at) * splat(scale[i]) + total[i][j]);
    }
}

template <Into into, int VECS>
static void gemm_columns(int M, int K, Strided a, const float* b, ptrdiff_t ldb, float* c,
                         ptrdiff_t ldc, const float* scale) {
#if defined(__AVX512F__)
  constexpr int ROWS = 6;  // 24 sums, 4 columns of B and one number of A in 32 registers
#else
  constexpr int ROWS = 4;
#endif
  int m = 0;
  auto tile = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    gemm_tile<into, R, VECS>(K, {a.p + m * a.row, a.row, a.column}, b, ldb, c + m * ldc, ldc,
                             into == Into::SCALE_ADD ? scale + m : nullptr);
    m += R;
  };
  while (m + ROWS <= M) tile(std::integral_constant<int, ROWS>{});
  switch (M - m) {
    case 5: tile(std::integral_constant<int, 5>{}); break;
    case 4: tile(std::integral_constant<int, 4>{}); break;
    case 3: tile(std::integral_constant<int, 3>{}); break;
    case 2: tile(std::integral_constant<int, 2>{}); break;
    case 1: tile(std::integral_constant<int, 1>{}); break;
  }
}

// M rows, N columns (a multiple of LANES), K terms.
template <Into into>
static void gemm(int M, int N, int K, Strided a, const float* b, ptrdiff_t ldb, float* c,
                 ptrdiff_t ldc, const float* scale = nullptr) {
#if defined(__AVX512F__)
  constexpr int VECS = 4;
#else
  constexpr int VECS = 2;
#endif
  int n = 0;
  for (; n + VECS * LANES <= N; n += VECS * LANES)
    gemm_columns<into, VECS>(M, K, a, b + n, ldb, c + n, ldc, scale);
  if (VECS == 4 && n + 2 * LANES <= N) {
    gemm_columns<into, 2>(M, K, a, b + n, ldb, c + n, ldc, scale);
    n += 2 * LANES;
  }
  for (; n + LANES <= N; n += LANES)
    gemm_columns<into, 1>(M, K, a, b + n, ldb, c + n, ldc, scale);
}
