// Muon's update of many small matrices, each from gradient to parameter in one core's cache.
//
//   momentum <- momentum + (1 - beta) (gradient - momentum)
//   u = gradient + beta (momentum - gradient),  wide, scaled to norm 1
//   five times:  gram = u u^T;  u <- a u + (b gram + c gram gram) u
//   parameter <- keep * parameter - scale * u
//
// Products are in bf16 on AMX's tiles with sums in fp32; of the symmetric ones half is computed.
// One task is one matrix, so the number of threads changes nothing.
#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "gemm_bf16.h"

namespace {

struct Matrix {  // [rows, columns], contiguous
  float* parameter;
  const float* gradient;
  float* momentum;
  int64_t rows, columns;
  float scale;
};

struct Step {
  float beta, fresh, keep;  // fresh is 1 - beta, rounded once
  float a, b, c;
  int64_t iterations, threads;
};

#if HAS_TILES

constexpr int64_t TILE = 32;  // rows and columns of a block: two tiles each way

int64_t rounded(int64_t n) { return up_to(n, TILE); }

// As torch.lerp computes it.
inline float lerp(float start, float end, float weight) {
  return weight < 0.5f ? std::fma(weight, end - start, start)
                       : std::fma(weight - 1.f, end - start, end);
}

// A block [32, 32] of fp32 as rows of bf16.
void to_rows(const float* block, ptrdiff_t row, bf16* to, ptrdiff_t to_row) {
  for (int i = 0; i < TILE; i++)
    _mm512_storeu_si512(to + i * to_row,
                        (__m512i)_mm512_cvtne2ps_pbh((__m512)load(block + i * row + 16),
                                                     (__m512)load(block + i * row)));
}

// The same as 32 terms of a right operand's strip of 32 columns: two tiles.
void to_terms(const float* block, ptrdiff_t row, bf16* to) {
  for (int i = 0; i < TILE; i += 2)
    for (int j = 0; j < TILE; j += 16)
      _mm512_storeu_si512(to + j * TILE + i * 16, bf16_pairs(load(block + i * row + j),
                                                             load(block + (i + 1) * row + j)));
}

// The transpose of a block that is rows of bf16 already, as terms.
void to_turned_terms(const bf16* rows, ptrdiff_t row, bf16* to) {
  for (int i = 0; i < TILE; i += 16)
    transpose_square(reinterpret_cast<const float*>(rows + i * row), row / 2,
                     reinterpret_cast<float*>(to + i * TILE), 16);
}

// Everything one thread needs for a matrix of at most `height` by `width`.
//
// A right operand [K, N] is cut in strips of 32 columns: [N / 32][K / 32] times two tiles.
class Workspace {
 public:
  Workspace(int64_t height, int64_t width)
      : u_(height * width), turned_(height * width), gram_(height * height),
        rows_(height * width), terms_(height * width), turned_terms_(height * width),
        gram_rows_(height * height), gram_terms_(height * height) {}

  void run(const Matrix& matrix, const Step& step) {
    const bool tall = matrix.rows > matrix.columns;
    const int64_t high = rounded(matrix.rows), wide = rounded(matrix.columns);
    m_ = tall ? wide : high, n_ = tall ? high : wide;
    float* natural = tall ? turned_ : u_;
    float norm = std::sqrt(advance(matrix, step, natural, high, wide));
    if (tall) transpose(int(high), int(wide), natural, wide, u_, high);
    const vec by = splat(1.f / (norm > 1e-7f ? norm : 1e-7f));
    for (int64_t i = 0; i < m_ * n_; i += LANES) store(u_ + i, load(u_ + i) * by);
    for (int64_t i = 0; i < step.iterations; i++) iterate(step);
    if (tall) transpose(int(m_), int(n_), u_, n_, turned_, m_);
    for (int64_t i = 0; i < matrix.rows; i++) {
      float* to = matrix.parameter + i * matrix.columns;
      const float* from = natural + i * wide;
      for (int64_t j = 0; j < matrix.columns; j++)
        to[j] = to[j] * step.keep - matrix.scale * from[j];
    }
  }

 private:
  // The momentum, and u filled up with zeros to [high, wide]; returns the sum of its squares.
  static float advance(const Matrix& matrix, const Step& step, float* u, int64_t high,
                       int64_t wide) {
    double total = 0.;
    for (int64_t i = 0; i < high; i++) {
      const int64_t n = i < matrix.rows ? matrix.columns : 0;
      const float* gradient = matrix.gradient + i * matrix.columns;
      float *momentum = matrix.momentum + i * matrix.columns, *to = u + i * wide;
      for (int64_t j = 0; j < n; j++) {
        momentum[j] = lerp(momentum[j], gradient[j], step.fresh);
        to[j] = lerp(gradient[j], momentum[j], step.beta);
      }
      for (int64_t j = n; j < wide; j++) to[j] = 0.f;
      vec squares{};
      for (int64_t j = 0; j < wide; j += LANES) squares += load(to + j) * load(to + j);
      total += sum(squares);
    }
    return float(total);
  }

  // Every term takes u and gram as rounded: f(u) forgives an error in u, a sum of two u does not.
  void iterate(const Step& step) {
    for (int64_t i = 0; i < m_; i += TILE)
      for (int64_t j = 0; j < n_; j += TILE) {
        to_rows(u_ + i * n_ + j, n_, rows_ + i * n_ + j, n_);
        to_terms(u_ + i * n_ + j, n_, terms_ + j * m_ + i * TILE);
        to_turned_terms(rows_ + i * n_ + j, n_, turned_terms_ + i * n_ + j * TILE);
      }
    for (int64_t i = 0; i < m_; i += TILE)
      for (int64_t j = i; j < m_; j += TILE) {
        float* block = gram_ + i * m_ + j;
        multiply(rows_ + i * n_, n_, turned_terms_ + j * n_, block, m_);
        mirror(block, gram_ + j * m_ + i, i == j);
      }
    for (int64_t i = 0; i < m_; i += TILE)
      for (int64_t j = 0; j < m_; j += TILE) {
        to_rows(gram_ + i * m_ + j, m_, gram_rows_ + i * m_ + j, m_);
        to_terms(gram_ + i * m_ + j, m_, gram_terms_ + j * m_ + i * TILE);
      }
    // b gram + c gram^2 takes gram's place.
    alignas(64) float square[TILE * TILE];
    const vec a = splat(step.a), b = splat(step.b), c = splat(step.c);
    for (int64_t i = 0; i < m_; i += TILE)
      for (int64_t j = i; j < m_; j += TILE) {
        float* block = gram_ + i * m_ + j;
        multiply(gram_rows_ + i * m_, m_, gram_terms_ + j * m_, square, TILE);
        for (int64_t r = 0; r < TILE; r++)
          for (int64_t s = 0; s < TILE; s += LANES)
            store(block + r * m_ + s, load_wide(gram_rows_ + (i + r) * m_ + j + s) * b +
                                          load(square + r * TILE + s) * c);
        mirror(block, gram_ + j * m_ + i, i == j);
      }
    for (int64_t i = 0; i < m_; i += TILE)
      for (int64_t j = 0; j < m_; j += TILE)
        to_rows(gram_ + i * m_ + j, m_, gram_rows_ + i * m_ + j, m_);
    for (int64_t j = 0; j < n_; j += TILE)
      for (int64_t i = 0; i < m_; i += TILE) {
        multiply(gram_rows_ + i * m_, m_, terms_ + j * m_, square, TILE);
        for (int64_t r = 0; r < TILE; r++)
          for (int64_t s = 0; s < TILE; s += LANES) {
            const int64_t at = (i + r) * n_ + j + s;
            store(u_ + at, load_wide(rows_ + at) * a + load(square + r * TILE + s));
          }
      }
  }

  // block [32, 32] = left [32, depth] right [depth, 32]
  static void multiply(const bf16* left, int64_t depth, const bf16* right, float* block,
                       ptrdiff_t row) {
    const Terms all{int(depth), left, int(depth), right, TILE};
    block_product<false, 2, 2>(&all, 1, block, row);
  }

  void mirror(const float* block, float* to, bool is_diagonal) const {
    if (!is_diagonal) transpose(TILE, TILE, block, m_, to, m_);
  }

  Buffer<float> u_, turned_, gram_;
  Buffer<bf16> rows_, terms_, turned_terms_, gram_rows_, gram_terms_;
  int64_t m_ = 0, n_ = 0;
};
#endif

}  // namespace

EXPORT int muon_is_possible() { return amx_granted(); }

EXPORT void muon_step(const Matrix* matrices, int64_t count, const Step* step) {
#if HAS_TILES
  std::vector<const Matrix*> order;
  int64_t height = 0, width = 0;
  for (int64_t i = 0; i < count; i++) {
    const Matrix& matrix = matrices[i];
    order.push_back(&matrix);
    height = std::max(height, rounded(std::min(matrix.rows, matrix.columns)));
    width = std::max(width, rounded(std::max(matrix.rows, matrix.columns)));
  }
  std::stable_sort(order.begin(), order.end(), [](const Matrix* x, const Matrix* y) {
    return x->rows * x->columns > y->rows * y->columns;
  });
#pragma omp parallel num_threads(step->threads) if (step->threads > 1)
  {
    const Tiles tiles(true);
    Workspace workspace(height, width);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) workspace.run(*order[i], *step);
  }
#else
  (void)matrices, (void)count, (void)step;
#endif
}
