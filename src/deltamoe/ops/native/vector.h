// Vectors of fp32 as wide as the machine has them, and what the operators here do with them.
//
// Written with GCC's and Clang's vector types, so that one text serves AVX-512, AVX2 and others.
// bf16 is a storage format only: it is read and written here, and never computed in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float vec_u __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }
static inline vec splat(float x) { return x - vec{}; }

// The numbers of two vectors taken in turn: the first halves', and the second halves'.
#if defined(__AVX512F__)
#define INTERLEAVE_LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX__)
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

// to[j * to_row + i] = from[i * from_row + j] for LANES x LANES numbers.
static inline void transpose_square(const float* from, ptrdiff_t from_row, float* to,
                                    ptrdiff_t to_row) {
  vec a[LANES], b[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) a[i] = load(from + i * from_row);
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 4) {  // two rounds of the shuffle a turn
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      b[2 * i] = INTERLEAVE_LOW(a[i], a[i + LANES / 2]);
      b[2 * i + 1] = INTERLEAVE_HIGH(a[i], a[i + LANES / 2]);
    }
    if (stage * 2 >= LANES) {  // an odd number of rounds: 8 lanes need three
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) a[i] = b[i];
      break;
    }
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      a[2 * i] = INTERLEAVE_LOW(b[i], b[i + LANES / 2]);
      a[2 * i + 1] = INTERLEAVE_HIGH(b[i], b[i + LANES / 2]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * to_row, a[i]);
}

// to [columns, rows] = from [rows, columns] transposed; both multiples of LANES.
static inline void transpose(int rows, int columns, const float* from, ptrdiff_t from_row,
                             float* to, ptrdiff_t to_row) {
  for (int i = 0; i < rows; i += LANES)
    for (int j = 0; j < columns; j += LANES)
      transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

static inline float sum(vec x) {
#if defined(__AVX512F__)
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif defined(__AVX__)
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
#endif
  return x[0] + x[1];
}

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}

// LANES numbers to and from memory, whatever their type there.
static inline vec load_wide(const float* p) { return load(p); }
static inline vec load_wide(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
  return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), ivec) << 16);
#endif
}
static inline void store_narrow(float* p, vec x) { store(p, x); }
static inline void store_narrow(bf16* p, vec x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < LANES; i++) p[i] = from_float<bf16>(x[i]);
#endif
}

// Past the caches, for what nothing reads soon: a store through them first reads what it
// overwrites. `p` is a whole number of vectors from a line's start. Other threads are sure to see
// it after `finish_stores_past_caches`.
static inline void store_past_caches(float* p, vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
static inline void finish_stores_past_caches() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
static inline bool is_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// n numbers into fp32, and back into what they were.
template <class T>
static inline void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load_wide(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}
template <class T>
static inline void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_narrow(to + i, load(from + i));
  for (; i < n; i++) to[i] = from_float<T>(from[i]);
}

// n numbers to where nothing reads them soon.
static inline void copy_past_caches(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; is_line(to) && i + LANES <= n; i += LANES) store_past_caches(to + i, load(from + i));
  memcpy(to + i, from + i, (n - i) * sizeof(float));
}
static inline void copy_past_caches(const float* from, int64_t n, bf16* to) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; is_line(to) && i + 32 <= n; i += 32)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                        (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + i + 16),
                                                     (__m512)load(from + i)));
#endif
  narrow(from + i, n - i, to + i);
}

// Rows that are needed in a moment and lie too far apart for the processor to foresee. GCC drops
// calls of a function that does nothing but ask for memory: the empty line of assembly counts.
static inline void prefetch(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
  asm volatile("");
}
// Rows that are written in a moment: a store, too, waits for its line of the cache.
static inline void prefetch_to_write(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 1, 3);
  asm volatile("");
}

// e^x to 2 ulp: 0 below -87.3 (no subnormal results), inf above 88.7, NaN stays NaN.
static inline float exp_fast(float x) {
  // Not further down: a subnormal on the way costs as much as ten of these.
  float bounded = x < -87.33f ? -87.33f : x;
  bounded = bounded > 89.f ? 89.f : bounded;
  float n = __builtin_rintf(bounded * 1.44269504f);
  float r = bounded - n * 0.693145752f;
  r -= n * 1.42860677e-6f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345199e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  int32_t steps = x == x ? int32_t(n) : 0;
  int32_t half = steps >> 1;  // two factors, since 2^128 is no fp32 number
  int32_t first = (half + 127) << 23, second = (steps - half + 127) << 23;
  float scale_1, scale_2;
  memcpy(&scale_1, &first, 4);
  memcpy(&scale_2, &second, 4);
  float result = p * scale_1 * scale_2;
  return x < -87.33f ? 0.f : result;
}

// log(1 + u) for u in [0, 1], as 2 artanh(u / (2 + u)): no cancellation for small u.
static inline float log1p_of_unit(float u) {
  float s = u / (2.f + u), s2 = s * s;
  float p = 1.f / 17.f;
  p = p * s2 + 1.f / 15.f;
  p = p * s2 + 1.f / 13.f;
  p = p * s2 + 1.f / 11.f;
  p = p * s2 + 1.f / 9.f;
  p = p * s2 + 1.f / 7.f;
  p = p * s2 + 1.f / 5.f;
  p = p * s2 + 1.f / 3.f;
  return 2.f * (s + s * s2 * p);
}

// exp_fast of every lane, quicker where the machine scales by 2^n in one instruction.
static inline vec exp_lanes(vec x) {
  const vec low = splat(-87.33f), high = splat(89.f);
#if defined(__AVX512F__)
  vec bounded = (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
  vec n = (vec)_mm512_roundscale_ps((__m512)(bounded * splat(1.44269504f)), 8);
#else
  vec bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  const vec shift = splat(12582912.f);  // 1.5 2^23: adding it rounds to a whole number
  vec n = bounded * splat(1.44269504f) + shift;
  n -= shift;
#endif
  vec r = bounded - n * splat(0.693145752f);
  r -= n * splat(1.42860677e-6f);
  vec p = splat(1.98756915e-4f);
  p = p * r + splat(1.39819995e-3f);
  p = p * r + splat(8.33345199e-3f);
  p = p * r + splat(4.16657959e-2f);
  p = p * r + splat(1.66666657e-1f);
  p = p * r + splat(0.5f);
  p = p * (r * r) + r + splat(1.f);
#if defined(__AVX512F__)
  __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);  // or NaN
  return (vec)_mm512_maskz_scalef_ps(is_normal, (__m512)p, (__m512)n);
#else
  ivec steps = __builtin_convertvector(n, ivec), half = steps >> 1;
  vec result = p * (vec)((half + 127) << 23) * (vec)((steps - half + 127) << 23);
  result = x < low ? vec{} : result;
  return x == x ? result : x;
#endif
}

// 2^x for x in [-1/2, 1/2], to 2e-7 of itself.
static inline vec exp2_of_fraction(vec x) {
  vec p = splat(1.3264727e-3f);
  p = p * x + splat(9.6715130e-3f);
  p = p * x + splat(5.5507336e-2f);
  p = p * x + splat(2.4022242e-1f);
  p = p * x + splat(6.9314700e-1f);
  return p * x + splat(1.f);
}

// 1 / (1 + e^-x) to 3e-7 of itself; below -87.3 it may be 0. Where a quick reciprocal is at hand it
// takes the place of a division that would last as long as all the rest.
static inline vec sigmoid_lanes(vec x) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_set1_ps(-87.33f), high = _mm512_set1_ps(87.33f);
  const __m512 bounded = _mm512_min_ps(high, _mm512_max_ps(low, (__m512)x));  // or NaN
  // e^-x is 2^(n + r). The factor is -1 / log 2 in two parts, and the first product is not rounded.
  const __m512 factor = _mm512_set1_ps(-1.44269502f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, factor), 8);
  const vec r = (vec)_mm512_fmsub_ps(bounded, factor, n) - (vec)bounded * splat(1.92596299e-8f);
  const __m512 power = _mm512_scalef_ps((__m512)exp2_of_fraction(r), n);
  const vec whole = splat(1.f) + (vec)power;
  const vec rough = (vec)_mm512_rcp14_ps((__m512)whole);
  const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, low, _CMP_NLT_UQ);  // or NaN
  return (vec)_mm512_maskz_mul_ps(is_normal, (__m512)rough, (__m512)(splat(2.f) - whole * rough));
#else
  return splat(1.f) / (splat(1.f) + exp_lanes(-x));
#endif
}
