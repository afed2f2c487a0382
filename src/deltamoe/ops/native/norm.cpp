// RMSNorm of rows, alone or times an activation of logits, forward and backward; see ops/norm.
//
//   y = x / sqrt(mean(x^2) + eps) * weight * activation(logits)
//
// The backward pass keeps the inputs alone. A row is brought into fp32 beside this core first, its
// end filled up with zeros. d_weight is summed in blocks of rows that the number of threads does
// not change.

#include <cmath>
#include <cstddef>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 256;  // rows whose share of d_weight is summed by one thread
constexpr int64_t AHEAD = 4;    // rows whose gradients' lines of the cache are asked for early

enum Activation { NONE, SIGMOID, SILU };

// Filled in by _Shape of ops/norm/native.py. The rows of x may stand apart; all others touch.
struct Shape {
  int64_t rows, size, x_row;
  float eps;
  int64_t threads;
};

template <class T>
void fetch_row(const T* from, int64_t size, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(to + i, load_wide(from + i));
  for (; i < size; i++) to[i] = to_float(from[i]);
  for (; i < padded; i++) to[i] = 0.f;
}

template <class T>
void store_row(const float* from, int64_t size, T* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store_narrow(to + i, load(from + i));
  for (; i < size; i++) to[i] = from_float<T>(from[i]);
}

int64_t padded_size(const Shape& shape) { return (shape.size + LANES - 1) / LANES * LANES; }

// A block of rows is a task; each gets room for `num_rows` fp32 rows.
template <class Task>
void for_each_block(const Shape& shape, int num_rows, Task task) {
  const int64_t blocks = (shape.rows + BLOCK - 1) / BLOCK, padded = padded_size(shape);
#pragma omp parallel num_threads(shape.threads) if (shape.threads > 1)
  {
    std::vector<float> room(num_rows * padded);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; block++) {
      int64_t begin = block * BLOCK;
      int64_t end = begin + BLOCK < shape.rows ? begin + BLOCK : shape.rows;
      task(block, begin, end, room.data());
    }
  }
}

inline float inverse_root(const Shape& shape, const float* x, int64_t padded) {
  vec squares{};
  for (int64_t i = 0; i < padded; i += LANES) squares += load(x + i) * load(x + i);
  return 1.f / std::sqrt(sum(squares) / float(shape.size) + shape.eps);
}

template <Activation act, class X, class Y>
void forward(const Shape& shape, const X* x, const float* weight, const X* logits, Y* y) {
  const int64_t size = shape.size, padded = padded_size(shape);
  for_each_block(shape, 3, [&](int64_t, int64_t begin, int64_t end, float* room) {
    float *in = room, *z = room + padded, *scale = room + 2 * padded;
    const vec one = splat(1.f);
    fetch_row(weight, size, padded, scale);
    for (int64_t r = begin; r < end; r++) {
      fetch_row(x + r * shape.x_row, size, padded, in);
      vec inverse = splat(inverse_root(shape, in, padded));
      for (int64_t i = 0; i < padded; i += LANES)
        store(in + i, load(in + i) * inverse * load(scale + i));
      if (act != NONE) {
        fetch_row(logits + r * size, size, padded, z);
        for (int64_t i = 0; i < padded; i += LANES) {
          vec logit = load(z + i), opening = one / (one + exp_lanes(-logit));
          store(in + i, load(in + i) * (act == SILU ? logit * opening : opening));
        }
      }
      store_row(in, size, y + r * size);
    }
  });
}

template <Activation act, class X, class Y>
void backward(const Shape& shape, const X* x, const float* weight, const X* logits, const Y* d_y,
              X* d_x, float* d_weight, X* d_logits) {
  const int64_t size = shape.size, padded = padded_size(shape);
  const int64_t blocks = (shape.rows + BLOCK - 1) / BLOCK;
  std::vector<float> shares(blocks * size);  // of d_weight
  for_each_block(shape, 5, [&](int64_t block, int64_t begin, int64_t end, float* room) {
    float *in = room, *z = in + padded, *d_out = z + padded, *scale = d_out + padded;
    float* share = scale + padded;
    const vec one = splat(1.f);
    fetch_row(weight, size, padded, scale);
    for (int64_t i = 0; i < padded; i++) share[i] = 0.f;
    for (int64_t r = begin; r < end; r++) {
      fetch_row(x + r * shape.x_row, size, padded, in);
      fetch_row(d_y + r * size, size, padded, d_out);
      if (r + AHEAD < end) {
        prefetch_to_write(d_x + (r + AHEAD) * size, size * sizeof(X));
        if (act != NONE) prefetch_to_write(d_logits + (r + AHEAD) * size, size * sizeof(X));
      }
      const float inverse = inverse_root(shape, in, padded);
      if (act != NONE) {
        fetch_row(logits + r * size, size, padded, z);
        for (int64_t i = 0; i < padded; i += LANES) {
          vec logit = load(z + i), opening = one / (one + exp_lanes(-logit));
          vec slope = opening * (one - opening), d = load(d_out + i);
          vec normed = load(in + i) * splat(inverse) * load(scale + i);
          store(d_out + i, d * (act == SILU ? logit * opening : opening));
          store(z + i, d * normed * (act == SILU ? opening + logit * slope : slope));
        }
        store_row(z, size, d_logits + r * size);
      }
      vec along{};
      for (int64_t i = 0; i < padded; i += LANES) {
        vec unit = load(in + i) * splat(inverse), d = load(d_out + i);
        store(in + i, unit);
        store(share + i, load(share + i) + d * unit);
        d *= load(scale + i);
        store(d_out + i, d);
        along += d * unit;
      }
      const vec mean = splat(sum(along) / float(size));
      for (int64_t i = 0; i < padded; i += LANES)
        store(d_out + i, (load(d_out + i) - load(in + i) * mean) * splat(inverse));
      store_row(d_out, size, d_x + r * size);
    }
    store_row(share, size, shares.data() + block * size);
  });
  for (int64_t i = 0; i < size; i++) d_weight[i] = 0.f;
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < size; i++) d_weight[i] += shares[block * size + i];
}

template <class X, class Y>
void forward_of_activation(const Shape& shape, int activation, const void* x, const float* weight,
                           const void* logits, void* y) {
  auto run = activation == NONE      ? forward<NONE, X, Y>
             : activation == SIGMOID ? forward<SIGMOID, X, Y>
                                     : forward<SILU, X, Y>;
  run(shape, static_cast<const X*>(x), weight, static_cast<const X*>(logits), static_cast<Y*>(y));
}

template <class X, class Y>
void backward_of_activation(const Shape& shape, int activation, const void* x, const float* weight,
                            const void* logits, const void* d_y, void* d_x, float* d_weight,
                            void* d_logits) {
  auto run = activation == NONE      ? backward<NONE, X, Y>
             : activation == SIGMOID ? backward<SIGMOID, X, Y>
                                     : backward<SILU, X, Y>;
  run(shape, static_cast<const X*>(x), weight, static_cast<const X*>(logits),
      static_cast<const Y*>(d_y), static_cast<X*>(d_x), d_weight, static_cast<X*>(d_logits));
}

}  // namespace

// x, logits and their gradients in one of fp32 and bf16, y and d_y in one of them.
EXPORT void rms_norm_forward(const Shape* shape, int activation, int x_is_bf16, int y_is_bf16,
                             const void* x, const float* weight, const void* logits, void* y) {
  auto run = x_is_bf16   ? (y_is_bf16 ? forward_of_activation<bf16, bf16>
                                      : forward_of_activation<bf16, float>)
             : y_is_bf16 ? forward_of_activation<float, bf16>
                         : forward_of_activation<float, float>;
  run(*shape, activation, x, weight, logits, y);
}

EXPORT void rms_norm_backward(const Shape* shape, int activation, int x_is_bf16, int y_is_bf16,
                              const void* x, const float* weight, const void* logits,
                              const void* d_y, void* d_x, float* d_weight, void* d_logits) {
  auto run = x_is_bf16   ? (y_is_bf16 ? backward_of_activation<bf16, bf16>
                                      : backward_of_activation<bf16, float>)
             : y_is_bf16 ? backward_of_activation<float, bf16>
                         : backward_of_activation<float, float>;
  run(*shape, activation, x, weight, logits, d_y, d_x, d_weight, d_logits);
}
