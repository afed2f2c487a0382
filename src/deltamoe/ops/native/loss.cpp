// Cross entropy of rows of logits, and its gradient written in their place.
//
//   loss[n] = log sum_v e^logits[n, v] - logits[n, target[n]]
//   logits[n, v] <- scale (softmax(logits[n])[v] - [v = target[n]])
//
// Each row is read from memory once and written once; sums are fp32. Rows are independent, so the
// number of threads changes nothing.
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

float largest_of(const float* x, int64_t size) {
  float result = -INFINITY;
  int64_t v = 0;
  if (size >= 4 * LANES) {  // four chains, or each comparison waits for the one before
    vec best[4];
    for (int j = 0; j < 4; j++) best[j] = load(x + j * LANES);
    for (v = 4 * LANES; v + 4 * LANES <= size; v += 4 * LANES)
      for (int j = 0; j < 4; j++) {
        vec next = load(x + v + j * LANES);
        best[j] = next > best[j] ? next : best[j];
      }
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < LANES; i++) result = best[j][i] > result ? best[j][i] : result;
  }
  for (; v < size; v++) result = x[v] > result ? x[v] : result;
  return result;
}

// One row in fp32 becomes e^(x - max); returns its loss and 1 / sum.
float exponentials(float* x, int64_t vocab, int64_t target, float* inverse) {
  float largest = largest_of(x, vocab);
  float chosen = x[target], total = 0.f;
  vec sums{};
  int64_t v = 0;
  for (; v + LANES <= vocab; v += LANES) {
    vec power = exp_lanes(load(x + v) - splat(largest));
    store(x + v, power);
    sums += power;
  }
  for (; v < vocab; v++) {
    x[v] = exp_fast(x[v] - largest);
    total += x[v];
  }
  total += sum(sums);
  *inverse = 1.f / total;
  return std::log(total) + (largest - chosen);
}

template <class T>
void cross_entropy_rows(T* logits, int64_t row, int64_t rows, int64_t vocab, const int64_t* targets,
                        int64_t no_target, float* losses, bool has_gradient, float scale,
                        int64_t threads) {
  constexpr bool is_wide = sizeof(T) == sizeof(float);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> copy(is_wide ? 0 : vocab);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n++) {
      T* at = logits + n * row;
      if (targets[n] == no_target) {
        losses[n] = 0.f;
        if (has_gradient)
          for (int64_t v = 0; v < vocab; v++) at[v] = from_float<T>(0.f);
        continue;
      }
      float* x = is_wide ? reinterpret_cast<float*>(at) : copy.data();
      if (!is_wide)
        for (int64_t v = 0; v < vocab; v++) x[v] = to_float(at[v]);
      float inverse;
      losses[n] = exponentials(x, vocab, targets[n], &inverse);
      if (!has_gradient) continue;
      float at_target = scale * (x[targets[n]] * inverse - 1.f);
      inverse *= scale;
      for (int64_t v = 0; v < vocab; v++) at[v] = from_float<T>(x[v] * inverse);
      at[targets[n]] = from_float<T>(at_target);
    }
  }
}

}  // namespace

// Overwrites the logits in any case: without a gradient what they hold afterwards means nothing.
EXPORT void cross_entropy(int is_bf16, void* logits, int64_t row, int64_t rows, int64_t vocab,
                          const int64_t* targets, int64_t no_target, float* losses,
                          int has_gradient, float scale, int64_t threads) {
  if (is_bf16)
    cross_entropy_rows(static_cast<bf16*>(logits), row, rows, vocab, targets, no_target, losses,
                       has_gradient, scale, threads);
  else
    cross_entropy_rows(static_cast<float*>(logits), row, rows, vocab, targets, no_target, losses,
                       has_gradient, scale, threads);
}
