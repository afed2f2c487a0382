// A matrix, perhaps quantised, times a few vectors; see matvec.h and ops/quantized.

#include "matvec.h"

#include <vector>

// y[b][0..rows) = W x[b] for `count` vectors that lie x_row and y_row numbers apart.
EXPORT void matvec(const Matrix* matrix, const float* x, int64_t x_row, int64_t count, float* y,
                   int64_t y_row, int threads) {
  const Matrix m = *matrix;
  const int64_t width = padded(m.columns), groups = width / GROUP;
  std::vector<float> values(count * width);
  std::vector<int8_t> codes(count * width);
  std::vector<float> scales(count * groups);
  std::vector<int32_t> sums(count * groups);
  std::vector<Vector> vectors(count);
  for (int64_t b = 0; b < count; b++) {
    float* here = values.data() + b * width;
    memcpy(here, x + b * x_row, m.columns * sizeof(float));
    vectors[b] = {here, codes.data() + b * width, scales.data() + b * groups,
                  sums.data() + b * groups};
    if (m.is_quantized())
      quantize(here, m.columns, codes.data() + b * width, scales.data() + b * groups,
               sums.data() + b * groups);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> out(count * TILE);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < m.tiles(); tile++) {
      tile_product(m, tile, vectors.data(), count, out.data());
      const int64_t first = tile * TILE, rows = m.rows - first < TILE ? m.rows - first : TILE;
      for (int64_t b = 0; b < count; b++)
        memcpy(y + b * y_row + first, out.data() + b * TILE, rows * sizeof(float));
    }
  }
}
