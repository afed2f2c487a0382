// What a token's step does beside products with weights: its rows, the small functions of them, and
// the step of a head's memory.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "matvec.h"

namespace {

template <class T>
struct CacheLines {  // an allocator
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) {
    void* p = std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
    if (!p) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }
};
template <class T>
using Room = std::vector<T, CacheLines<T>>;

// Vectors of one width, zero up to their padded width.
struct Rows {
  Room<float> numbers;
  int64_t stride = 0;

  void reserve(int64_t count, int64_t width, int64_t gap = 0) {
    stride = std::max(stride, padded(width) + gap);
    if (int64_t(numbers.size()) < count * stride) numbers.assign(count * stride, 0.f);
  }
  float* operator[](int64_t i) { return numbers.data() + i * stride; }
};

// Vectors rounded for quantised matrices.
struct Rounded {
  Room<int8_t> codes;
  Room<float> scales;
  Room<int32_t> sums;

  void reserve(int64_t numbers) {
    if (int64_t(codes.size()) >= numbers) return;
    codes.resize(numbers);
    scales.resize(numbers / GROUP);
    sums.resize(numbers / GROUP);
  }
};

inline float sigmoid(float x) { return 1.f / (1.f + exp_fast(-x)); }
inline float silu(float x) { return x / (1.f + exp_fast(-x)); }

inline float softplus(float x) {
  return (x > 0.f ? x : 0.f) + log1p_of_unit(exp_fast(x > 0.f ? -x : x));
}

float sum_of_squares(const float* x, int64_t n) {
  vec total = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total += load(x + i) * load(x + i);
  float rest = 0.f;
  for (; i < n; i++) rest += x[i] * x[i];
  return sum(total) + rest;
}

void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* y) {
  const float by = 1.f / std::sqrt(sum_of_squares(x, n) / float(n) + float(eps));
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * by * weight[i];
}

void unit_length(float* x, int64_t n, float scale) {
  const float by = scale / std::sqrt(sum_of_squares(x, n) + 1e-6f);
  for (int64_t i = 0; i < n; i++) x[i] *= by;
}

// One head's memory [K, V] by one token; V a multiple of LANES. What is read from the updated
// memory is known before it is updated: S'^T q = S^T (decay q) + (k.q) write.
//
// Where all memories together are larger than a cache, `after` is written past the caches
// (`streams`): nothing reads it before the next token, and a store through the cache would first
// read what it overwrites. That is a third of the step's traffic, and time.
template <int VECS, bool streams>
void delta_columns(int64_t K, int64_t V, const float* before, float* after, const float* retained,
                   const float* q, const float* k, const float* v, float beta, float k_q,
                   float* out) {
  vec predicted[VECS] = {}, read[VECS] = {};
  for (int64_t i = 0; i < K; i++) {
    const vec by_k = splat(retained[i] * k[i]), by_q = splat(retained[i] * q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      const float* at = before + i * V + j * LANES;
      __builtin_prefetch(at + 1024, 0, 2);
      vec here = load(at);
      predicted[j] += here * by_k;
      read[j] += here * by_q;
    }
  }
  vec write[VECS];
#pragma GCC unroll 8
  for (int j = 0; j < VECS; j++) {
    write[j] = splat(beta) * (load(v + j * LANES) - predicted[j]);
    store(out + j * LANES, read[j] + splat(k_q) * write[j]);
  }
  for (int64_t i = 0; i < K; i++) {
    const vec keep = splat(retained[i]), by = splat(k[i]);
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      const int64_t at = i * V + j * LANES;
      __builtin_prefetch(before + K * V + at, 0, 2);  // the next head's
      vec here = load(before + at) * keep + by * write[j];
      if (streams) store_past_caches(after + at, here);
      else store(after + at, here);
    }
  }
}

template <bool streams>
void delta_step(int64_t K, int64_t V, const float* before, float* after, const float* retained,
                const float* q, const float* k, const float* v, float beta, float* out) {
  float k_q = 0.f;
  for (int64_t i = 0; i < K; i++) k_q += k[i] * q[i];
  int64_t n = 0;
  auto columns = [&](auto step, int64_t width) {
    for (; n + width <= V; n += width)
      step(K, V, before + n, after + n, retained, q, k, v + n, beta, k_q, out + n);
  };
  columns(delta_columns<8, streams>, 8 * LANES);
  columns(delta_columns<4, streams>, 4 * LANES);
  columns(delta_columns<1, streams>, LANES);
}

}  // namespace
