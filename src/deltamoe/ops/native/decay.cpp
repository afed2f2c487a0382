// From decay logits to the log of the decay, forward and backward; see ops/kda/decay.
//
//   softplus   y = -rate softplus(logits + bias)             rate = e^A_log
//   bounded    y = lower_bound sigmoid(rate (logits + bias))
//
// Rows are tokens, columns heads and channels; rate and bias are given for every column. The sums
// over the rows are taken in blocks that the number of threads does not change.

#include <cstddef>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 128;  // rows summed by one thread

template <bool is_bounded, class X>
void forward(int64_t rows, int64_t columns, float lower_bound, int threads, const X* logits,
             const float* rate, const float* bias, float* y) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const X* in = logits + r * columns;
    float* out = y + r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) {
      float x = to_float(in[i]) + bias[i];
      if (is_bounded) {
        out[i] = lower_bound / (1.f + exp_fast(-rate[i] * x));
      } else {
        float positive = x > 0.f ? x : 0.f, negative = x > 0.f ? -x : x;
        out[i] = -rate[i] * (positive + log1p_of_unit(exp_fast(negative)));
      }
    }
  }
}

// d_rate is the gradient of log(rate), column by column.
template <bool is_bounded, class X>
void backward(int64_t rows, int64_t columns, float lower_bound, int threads, const X* logits,
              const float* rate, const float* bias, const float* d_y, X* d_logits, float* d_bias,
              float* d_rate) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  std::vector<float> shares(blocks * 2 * columns);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    float *of_bias = shares.data() + block * 2 * columns, *of_rate = of_bias + columns;
    const int64_t end = (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;
    for (int64_t r = block * BLOCK; r < end; r++) {
      const X* in = logits + r * columns;
      const float* d_out = d_y + r * columns;
      X* d_in = d_logits + r * columns;
#pragma omp simd
      for (int64_t i = 0; i < columns; i++) {
        float x = to_float(in[i]) + bias[i], d;
        if (is_bounded) {
          float opening = 1.f / (1.f + exp_fast(-rate[i] * x));
          float d_log = d_out[i] * lower_bound * opening * (1.f - opening) * rate[i];
          of_rate[i] += d_log * x;
          d = d_log;
        } else {
          float small = exp_fast(x > 0.f ? -x : x);
          float softplus = (x > 0.f ? x : 0.f) + log1p_of_unit(small);
          of_rate[i] -= d_out[i] * rate[i] * softplus;
          d = -d_out[i] * rate[i] * ((x > 0.f ? 1.f : small) / (1.f + small));
        }
        of_bias[i] += d;
        d_in[i] = from_float<X>(d);
      }
    }
  }
  for (int64_t i = 0; i < columns; i++) {
    float bias_total = 0.f, rate_total = 0.f;
    for (int64_t block = 0; block < blocks; block++) {
      bias_total += shares[block * 2 * columns + i];
      rate_total += shares[(block * 2 + 1) * columns + i];
    }
    d_bias[i] = bias_total;
    d_rate[i] = rate_total;
  }
}

template <class X>
void forward_of_form(int is_bounded, int64_t rows, int64_t columns, float lower_bound, int threads,
                     const void* logits, const float* rate, const float* bias, float* y) {
  auto run = is_bounded ? forward<true, X> : forward<false, X>;
  run(rows, columns, lower_bound, threads, static_cast<const X*>(logits), rate, bias, y);
}

template <class X>
void backward_of_form(int is_bounded, int64_t rows, int64_t columns, float lower_bound, int threads,
                      const void* logits, const float* rate, const float* bias, const float* d_y,
                      void* d_logits, float* d_bias, float* d_rate) {
  auto run = is_bounded ? backward<true, X> : backward<false, X>;
  run(rows, columns, lower_bound, threads, static_cast<const X*>(logits), rate, bias, d_y,
      static_cast<X*>(d_logits), d_bias, d_rate);
}

}  // namespace

EXPORT void decay_forward(int is_bf16, int is_bounded, int64_t rows, int64_t columns,
                          float lower_bound, int threads, const void* logits, const float* rate,
                          const float* bias, float* y) {
  auto run = is_bf16 ? forward_of_form<bf16> : forward_of_form<float>;
  run(is_bounded, rows, columns, lower_bound, threads, logits, rate, bias, y);
}

EXPORT void decay_backward(int is_bf16, int is_bounded, int64_t rows, int64_t columns,
                           float lower_bound, int threads, const void* logits, const float* rate,
                           const float* bias, const float* d_y, void* d_logits, float* d_bias,
                           float* d_rate) {
  auto run = is_bf16 ? backward_of_form<bf16> : backward_of_form<float>;
  run(is_bounded, rows, columns, lower_bound, threads, logits, rate, bias, d_y, d_logits, d_bias,
      d_rate);
}
