// What all ways to run experts share: the problem, and what is done between and after the products.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "buffer.h"
#include "vector.h"

namespace {

struct Problem {
  int64_t tokens, choices, experts, dim, hidden;
  int64_t routed;               // rows: copies of tokens
  int64_t threads;
  const int64_t* counts;        // [experts] rows of each
  const int64_t* assignments;   // [routed] token * choices + choice; null: row r is token r
  const int64_t* rows;          // [tokens * choices] the inverse, `routed` for none; null likewise
  const float* weights;         // [tokens * choices]; null for 1
};

struct Gradients {
  const void *y, *kept;  // given; the second as forward kept it
  void *x, *w_gate, *w_up, *w_down;
  float* weights;  // [tokens * choices], zero where dropped; null if not wanted
};

int64_t token_of(const Problem& p, int64_t row) {
  return p.assignments ? p.assignments[row] / p.choices : row;
}

float weight_of(const Problem& p, int64_t row) {
  return p.weights ? p.weights[p.assignments ? p.assignments[row] : row] : 1.f;
}

// The answers of a channel that everyone visits once are its output already.
template <class E, class X>
bool writes_directly(const Problem& p) {
  return std::is_same_v<X, E> && !p.rows && !p.weights;
}

template <class From, class To>
void convert(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    memcpy(to, from, n * sizeof(To));
  } else {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_narrow(to + i, load_wide(from + i));
    for (; i < n; i++) to[i] = from_float<To>(to_float(from[i]));
  }
}

// ── activations ──────────────────────────────────────────────────────────────────────────────────

// silu(gate) * up, and what its gradient d means for either.
struct Swiglu {
  Swiglu(vec gate, vec up)
      : up(up), open(sigmoid_lanes(gate)), silu(gate * open) {}
  vec value() const { return silu * up; }
  vec d_gate(vec d) const { return d * up * (open + silu * (splat(1.f) - open)); }
  vec d_up(vec d) const { return d * silu; }

  vec up, open, silu;
};

constexpr float SQRT_HALF = 0.70710678f, INVERSE_SQRT_TAU = 0.39894228f;

struct Gelu {
  explicit Gelu(float x) {
    const float portion = 0.5f * (1.f + std::erf(x * SQRT_HALF));
    value = x * portion, slope = portion + x * INVERSE_SQRT_TAU * exp_fast(-0.5f * x * x);
  }
  float value, slope;
};

void gelu(int64_t n, float* x) {
  for (int64_t i = 0; i < n; i++) x[i] = Gelu(x[i]).value;
}

// ── after the products ───────────────────────────────────────────────────────────────────────────

// y[n] = sum_a weight[n, a] answers[row of (n, a)], in the order of a.
template <class E, class X>
void combine(const Problem& p, const E* answers, bool weighs, X* y) {
  const auto row_of = [&](int64_t i) { return p.rows ? p.rows[i] : i; };
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Buffer<float> sum(p.dim);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.tokens; n++) {
      memset(sum, 0, p.dim * 4);
      for (int64_t i = n * p.choices; i < (n + 1) * p.choices; i++) {
        constexpr int64_t AHEAD = 8;
        if (i + AHEAD < p.tokens * p.choices && row_of(i + AHEAD) < p.routed)
          prefetch(answers + row_of(i + AHEAD) * p.dim, p.dim * sizeof(E));
        const int64_t row = row_of(i);
        if (row >= p.routed) continue;
        const float weight = weighs && p.weights ? p.weights[i] : 1.f;
        const E* answer = answers + row * p.dim;
        float* to = sum;
        int64_t c = 0;
        for (; c + LANES <= p.dim; c += LANES)
          store(to + c, load(to + c) + splat(weight) * load_wide(answer + c));
        for (; c < p.dim; c++) to[c] += weight * to_float(answer[c]);
      }
      convert(static_cast<float*>(sum), p.dim, y + n * p.dim);
    }
  }
}

}  // namespace
