// A matrix, perhaps quantised, times a few vectors, and what a quantised one stands for; see
// matvec.h and ops/quantized.

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
      tile_product(m, tile, {vectors.data(), count}, out.data());
      const int64_t first = tile * TILE, rows = m.rows - first < TILE ? m.rows - first : TILE;
      for (int64_t b = 0; b < count; b++)
        memcpy(y + b * y_row + first, out.data() + b * TILE, rows * sizeof(float));
    }
  }
}

// The codes of 16 outputs and 32 inputs, row by row.
template <int BITS>
static inline void sort_codes(const uint8_t* from, uint8_t to[TILE][GROUP]) {
  for (int row = 0; row < TILE; row++, from += 4)
    for (int i = 0; i < GROUP; i += 4) {
      uint32_t four;
      memcpy(&four, from + (BITS == 8 ? i / 4 : i / 8) * 64, 4);
      if (BITS == 4) four = (four >> i % 8) & 0x0f0f0f0f;
      memcpy(to[row] + i, &four, 4);
    }
}

static inline vec widen(const uint8_t* codes) {  // LANES of them
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#else
  vec wide;
  for (int i = 0; i < LANES; i++) wide[i] = float(codes[i]);
  return wide;
#endif
}

template <int BITS, class T>
static void unpack_tile(const Matrix& m, int64_t tile, T* to) {
  constexpr int64_t BYTES = TILE * GROUP * BITS / 8;
  constexpr float MIDDLE = BITS == 8 ? 128.f : 8.f;
  const int64_t groups = m.groups(), first = tile * TILE;
  const int64_t rows = m.rows - first < TILE ? m.rows - first : TILE;
  const uint8_t* values = static_cast<const uint8_t*>(m.values) + tile * groups * BYTES;
  const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + tile * groups * TILE;
  for (int64_t g = 0; g < groups; g++, values += BYTES, scales += TILE) {
    uint8_t codes[TILE][GROUP];
    sort_codes<BITS>(values, codes);
    float by[TILE];
    store_lanes(by, load_halves(scales));
    const int64_t width = m.columns - g * GROUP < GROUP ? m.columns - g * GROUP : GROUP;
    for (int64_t row = 0; row < rows; row++) {
      T line[GROUP], *here = to + (first + row) * m.columns + g * GROUP;
      T* at = width == GROUP ? here : line;
      for (int i = 0; i < GROUP; i += LANES)
        store_narrow(at + i, (widen(codes[row] + i) - splat(MIDDLE)) * splat(by[row]));
      if (width < GROUP) memcpy(here, line, width * sizeof(T));
    }
  }
}

// What `count` quantised matrices stand for, in fp32 or bf16.
EXPORT void unpack(const Matrix* matrix, int64_t count, void* to, int is_bf16, int threads) {
  const int64_t tiles = matrix->tiles(), size = matrix->rows * matrix->columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t at = 0; at < count * tiles; at++) {
    const Matrix one = matrix->at(at / tiles);
    const int64_t start = at / tiles * size, tile = at % tiles;
    auto unpack_to = [&](auto* all) {
      if (one.kind == INT8) unpack_tile<8>(one, tile, all + start);
      else unpack_tile<4>(one, tile, all + start);
    };
    if (is_bf16) unpack_to(static_cast<bf16*>(to));
    else unpack_to(static_cast<float*>(to));
  }
}
