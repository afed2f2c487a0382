// Products of quantised matrices, in the layout of ops/quantized, with a few vectors rounded to 8
// bits: whole numbers are summed within a group of inputs, and scaled.
#pragma once

#include <cstring>

#include "matrix.h"

static inline float half_to_float(uint16_t half) {
  uint32_t magnitude = half & 0x7fff, bits = (magnitude << 13) + (112u << 23);
  float value;
  if (magnitude < 0x400) {  // subnormal
    value = float(magnitude) * 5.9604644775390625e-8f;
  } else {
    memcpy(&value, &bits, 4);
  }
  return half & 0x8000 ? -value : value;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Sixteen numbers, one an output of the tile.
struct Lanes {
  __m512 x;
};
struct Codes {  // four codes for each output
  __m512i x;
};
static inline Lanes zero_lanes() { return {_mm512_setzero_ps()}; }
static inline void store_lanes(float* p, Lanes a) { _mm512_storeu_ps(p, a.x); }
static inline Lanes load_halves(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Codes low_halves(Codes c) {
  return {_mm512_and_si512(c.x, _mm512_set1_epi8(15))};
}
static inline Codes high_halves(Codes c) {
  return {_mm512_and_si512(_mm512_srli_epi16(c.x, 4), _mm512_set1_epi8(15))};
}
struct Sums {
  __m512i x;
};
static inline Sums start_sums(int32_t value) { return {_mm512_set1_epi32(value)}; }
static inline void add_products(Sums& s, Codes c, int32_t four) {
#if defined(__AVX512VNNI__)
  s.x = _mm512_dpbusd_epi32(s.x, c.x, _mm512_set1_epi32(four));
#else
  const __m512i low = _mm512_set1_epi16(255), x = _mm512_set1_epi32(four);
  __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd = _mm512_srai_epi16(x, 8);
  s.x = _mm512_add_epi32(s.x, _mm512_madd_epi16(_mm512_and_si512(c.x, low), even));
  s.x = _mm512_add_epi32(s.x, _mm512_madd_epi16(_mm512_srli_epi16(c.x, 8), odd));
#endif
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  __m512 both = _mm512_mul_ps(weight_scale.x, _mm512_set1_ps(scale));
  total.x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s.x), both, total.x);
}
#elif defined(__AVX2__)
struct Lanes {
  __m256 low, high;
};
struct Codes {
  __m256i low, high;
};
static inline Lanes zero_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline void store_lanes(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
static inline Lanes load_halves(const uint16_t* p) {
#if defined(__F16C__)
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
#else
  alignas(32) float x[16];
  for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
  return {_mm256_load_ps(x), _mm256_load_ps(x + 8)};
#endif
}
static inline Codes load_codes(const uint8_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
static inline Codes low_halves(Codes c) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(c.low, mask), _mm256_and_si256(c.high, mask)};
}
static inline Codes high_halves(Codes c) {
  return low_halves({_mm256_srli_epi16(c.low, 4), _mm256_srli_epi16(c.high, 4)});
}
struct Sums {
  __m256i low, high;
};
static inline Sums start_sums(int32_t value) {
  return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}
static inline __m256i add_products(__m256i s, __m256i c, int32_t four) {
  const __m256i x = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(s, c, x);
#else
  __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
  __m256i even_codes = _mm256_and_si256(c, _mm256_set1_epi16(255));
  s = _mm256_add_epi32(s, _mm256_madd_epi16(even_codes, even));
  return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_srli_epi16(c, 8), odd));
#endif
}
static inline void add_products(Sums& s, Codes c, int32_t four) {
  s.low = add_products(s.low, c.low, four);
  s.high = add_products(s.high, c.high, four);
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  const __m256 by = _mm256_set1_ps(scale);
  __m256 low = _mm256_mul_ps(weight_scale.low, by), high = _mm256_mul_ps(weight_scale.high, by);
  total.low = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s.low), low), total.low);
  total.high = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s.high), high), total.high);
}
#else
struct Lanes {
  float x[TILE];
};
struct Codes {
  uint8_t x[TILE * 4];
};
static inline Lanes zero_lanes() { return {}; }
static inline void store_lanes(float* p, Lanes a) { memcpy(p, a.x, sizeof a.x); }
static inline Lanes load_halves(const uint16_t* p) {
  Lanes a;
  for (int i = 0; i < TILE; i++) a.x[i] = half_to_float(p[i]);
  return a;
}
static inline Codes load_codes(const uint8_t* p) {
  Codes c;
  memcpy(c.x, p, sizeof c.x);
  return c;
}
static inline Codes low_halves(Codes c) {
  for (uint8_t& x : c.x) x &= 15;
  return c;
}
static inline Codes high_halves(Codes c) {
  for (uint8_t& x : c.x) x >>= 4;
  return c;
}
struct Sums {
  int32_t x[TILE];
};
static inline Sums start_sums(int32_t value) {
  Sums s;
  for (int32_t& x : s.x) x = value;
  return s;
}
static inline void add_products(Sums& s, Codes c, int32_t four) {
  int8_t x[4];
  memcpy(x, &four, 4);
  for (int i = 0; i < TILE; i++)
    for (int j = 0; j < 4; j++) s.x[i] += int32_t(c.x[4 * i + j]) * x[j];
}
static inline void add_scaled(Lanes& total, Sums s, Lanes weight_scale, float scale) {
  for (int i = 0; i < TILE; i++) total.x[i] += float(s.x[i]) * (weight_scale.x[i] * scale);
}
#endif

template <int BITS, int COUNT>
static void quantized_pass(const uint8_t* w, const uint16_t* scales, int64_t groups,
                           const Vector* x, float* out, Pass pass,
                           int64_t to_next) {
  constexpr int STEPS = BITS == 8 ? 8 : 4, SHIFT = BITS == 8 ? 7 : 3;  // codes lie around 2^SHIFT
  constexpr int64_t GROUP_BYTES = STEPS * 64;
  Lanes total[COUNT];
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) total[b] = zero_lanes();
  for (int64_t g = 0; g < groups; g++, w += GROUP_BYTES, scales += TILE) {
    const uint8_t* next = w + pass.ahead(g, to_next);
    Codes codes[8];
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++) {
      prefetch(next + j * 64);
      Codes read = load_codes(w + j * 64);
      if (BITS == 8) {
        codes[j] = read;
      } else {
        codes[2 * j] = low_halves(read);
        codes[2 * j + 1] = high_halves(read);
      }
    }
    Lanes weight_scale = load_halves(scales);
#pragma GCC unroll 8
    for (int b = 0; b < COUNT; b++) {
      Sums sums = start_sums(x[b].sums[g] * (1 << SHIFT));
      const int8_t* from = x[b].codes + g * GROUP;
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        int32_t four;
        memcpy(&four, from + 4 * j, 4);
        add_products(sums, codes[j], four);
      }
      add_scaled(total[b], sums, weight_scale, x[b].scales[g]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < COUNT; b++) store_lanes(out + b * TILE, total[b]);
}

template <int BITS>
static void quantized_tile(const uint8_t* w, const uint16_t* scales, int64_t groups,
                           const Vector* x, int64_t count, float* out, int64_t to_next,
                           Turn turn) {
  in_passes<8>(count, turn, [&](Pass pass, auto constant) {
    quantized_pass<BITS, decltype(constant)::value>(w, scales, groups, x + pass.first,
                                                    out + pass.first * TILE, pass, to_next);
  });
}

// Round n numbers, padded with zeros, for a quantised matrix; `Vector` says what is what. A group
// that holds NaN or infinity gets the scale NaN.
static inline void quantize(const float* x, int64_t n, int8_t* codes, float* scales,
                            int32_t* sums) {
  typedef int8_t bytes __attribute__((vector_size(LANES)));
  const ivec no_sign = ivec{} + 0x7fffffff;
  for (int64_t g = 0; g * GROUP < n; g++, x += GROUP, codes += GROUP) {
    vec largest = {}, damage = {};
    for (int i = 0; i < GROUP; i += LANES) {
      vec here = load(x + i), size = (vec)((ivec)here & no_sign);
      largest = size > largest ? size : largest;
      damage += here * vec{};  // NaN for what is not finite
    }
    float most = 0.f;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    const vec inverse = splat(most > 0.f ? 127.f / most : 0.f);
    const vec shift = splat(12582912.f);  // 1.5 2^23: adding it rounds to a whole number
    ivec total = {};
    for (int i = 0; i < GROUP; i += LANES) {
      vec rounded = (load(x + i) * inverse + shift);
      ivec code = (ivec)rounded - (ivec)shift;
      total += code;
      const bytes narrow = __builtin_convertvector(code, bytes);
      memcpy(codes + i, &narrow, sizeof narrow);
    }
    int32_t all = 0;
    for (int i = 0; i < LANES; i++) all += total[i];
    scales[g] = most / 127.f + sum(damage);
    sums[g] = -all;
  }
}
