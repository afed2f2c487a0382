// RMSNorm of rows, forward and backward; see ops/norm. Alone or times an activation of logits,
//
//   y = x / sqrt(mean(x^2) + eps) * weight * activation(logits)
//
// or of a stream to which a branch is added first, whose sum is an answer as well.
// The backward pass keeps the inputs (of a sum, the sum) alone. A row is brought into fp32 beside
// this core first, its end filled up with zeros. d_weight is summed in blocks of rows that the
// number of threads does not change.

#include <cmath>
#include <cstddef>
#include <vector>

#include "buffer.h"
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
void fetch_row(const T* from, int64_t size, float* to) {
  widen(from, size, to);
  for (int64_t i = size; i < up_to(size, LANES); i++) to[i] = 0.f;
}

// A block of rows is a task; each gets room for `num_rows` fp32 rows.
template <class Task>
void for_each_block(const Shape& shape, int num_rows, Task task) {
  const int64_t blocks = (shape.rows + BLOCK - 1) / BLOCK, padded = up_to(shape.size, LANES);
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

// x, of length `padded`, becomes its norm times the weights.
inline void normalize(const Shape& shape, float* x, const float* weight, int64_t padded) {
  const vec inverse = splat(inverse_root(shape, x, padded));
  for (int64_t i = 0; i < padded; i += LANES)
    store(x + i, load(x + i) * inverse * load(weight + i));
}

// From d, the gradient of x's norm times the weights, that of x in its place; x becomes its norm,
// and the weights' gradient is added to d_weight.
inline void normalize_backward(const Shape& shape, float* x, float* d, const float* weight,
                               float* d_weight, float inverse, int64_t padded) {
  vec along{};
  for (int64_t i = 0; i < padded; i += LANES) {
    vec unit = load(x + i) * splat(inverse), slope = load(d + i);
    store(x + i, unit);
    store(d_weight + i, load(d_weight + i) + slope * unit);
    slope *= load(weight + i);
    store(d + i, slope);
    along += slope * unit;
  }
  const vec mean = splat(sum(along) / float(shape.size));
  for (int64_t i = 0; i < padded; i += LANES)
    store(d + i, (load(d + i) - load(x + i) * mean) * splat(inverse));
}

// For gradients: row(r, end, scale, d_scale, room) has the weights, adds to their gradient and has
// `num_rows` rows of room. A block's share of d_weight is a sum of its own; shares are added in
// their order.
template <class Row>
void for_each_row_back(const Shape& shape, const float* weight, float* d_weight, int num_rows,
                       Row row) {
  const int64_t size = shape.size, padded = up_to(size, LANES);
  std::vector<float> shares((shape.rows + BLOCK - 1) / BLOCK * size);
  for_each_block(shape, num_rows + 2, [&](int64_t block, int64_t begin, int64_t end, float* room) {
    float *scale = room, *d_scale = scale + padded;
    fetch_row(weight, size, scale);
    for (int64_t i = 0; i < padded; i++) d_scale[i] = 0.f;
    for (int64_t r = begin; r < end; r++) row(r, end, scale, d_scale, d_scale + padded);
    narrow(d_scale, size, shares.data() + block * size);
  });
  for (int64_t i = 0; i < size; i++) d_weight[i] = 0.f;
  for (size_t begin = 0; begin < shares.size(); begin += size)
    for (int64_t i = 0; i < size; i++) d_weight[i] += shares[begin + i];
}

template <Activation act, class X, class Y>
void forward(const Shape& shape, const X* x, const float* weight, const X* logits, Y* y) {
  const int64_t size = shape.size, padded = up_to(shape.size, LANES);
  for_each_block(shape, 3, [&](int64_t, int64_t begin, int64_t end, float* room) {
    float *in = room, *z = room + padded, *scale = room + 2 * padded;
    fetch_row(weight, size, scale);
    for (int64_t r = begin; r < end; r++) {
      fetch_row(x + r * shape.x_row, size, in);
      normalize(shape, in, scale, padded);
      if (act != NONE) {
        fetch_row(logits + r * size, size, z);
        for (int64_t i = 0; i < padded; i += LANES) {
          vec logit = load(z + i), opening = sigmoid_lanes(logit);
          store(in + i, load(in + i) * (act == SILU ? logit * opening : opening));
        }
      }
      narrow(in, size, y + r * size);
    }
  });
}

template <Activation act, class X, class Y>
void backward(const Shape& shape, const X* x, const float* weight, const X* logits, const Y* d_y,
              X* d_x, float* d_weight, X* d_logits) {
  const int64_t size = shape.size, padded = up_to(size, LANES);
  const vec one = splat(1.f);
  for_each_row_back(shape, weight, d_weight, 3, [&](int64_t r, int64_t end, const float* scale,
                                                    float* d_scale, float* room) {
    float *in = room, *z = in + padded, *d_out = z + padded;
    fetch_row(x + r * shape.x_row, size, in);
    fetch_row(d_y + r * size, size, d_out);
    if (r + AHEAD < end) {
      prefetch_to_write(d_x + (r + AHEAD) * size, size * sizeof(X));
      if (act != NONE) prefetch_to_write(d_logits + (r + AHEAD) * size, size * sizeof(X));
    }
    const float inverse = inverse_root(shape, in, padded);
    if (act != NONE) {
      fetch_row(logits + r * size, size, z);
      for (int64_t i = 0; i < padded; i += LANES) {
        vec logit = load(z + i), opening = sigmoid_lanes(logit);
        vec slope = opening * (one - opening), d = load(d_out + i);
        vec normed = load(in + i) * splat(inverse) * load(scale + i);
        store(d_out + i, d * (act == SILU ? logit * opening : opening));
        store(z + i, d * normed * (act == SILU ? opening + logit * slope : slope));
      }
      narrow(z, size, d_logits + r * size);
    }
    normalize_backward(shape, in, d_out, scale, d_scale, inverse, padded);
    narrow(d_out, size, d_x + r * size);
  });
}

// total = x + branch and y = norm(total) * weight. Without a branch total is x, and not written.
template <class X, class Branch, class Y>
void add_forward(const Shape& shape, const X* x, const Branch* branch, const float* weight,
                 X* total, Y* y) {
  const int64_t size = shape.size, padded = up_to(shape.size, LANES);
  for_each_block(shape, 3, [&](int64_t, int64_t begin, int64_t end, float* room) {
    float *in = room, *added = room + padded, *scale = room + 2 * padded;
    fetch_row(weight, size, scale);
    for (int64_t r = begin; r < end; r++) {
      fetch_row(x + r * size, size, in);
      if (branch) {
        fetch_row(branch + r * size, size, added);
        for (int64_t i = 0; i < padded; i += LANES) store(in + i, load(in + i) + load(added + i));
        narrow(in, size, total + r * size);
        if (sizeof(X) < sizeof(float)) fetch_row(total + r * size, size, in);  // rounded
      }
      normalize(shape, in, scale, padded);
      narrow(in, size, y + r * size);
    }
  });
}

// d_total, what else is asked of the sum, may be null; so may d_branch, which has d_x's numbers.
template <class X, class Branch, class Y>
void add_backward(const Shape& shape, const X* total, const float* weight, const X* d_total,
                  const Y* d_y, X* d_x, Branch* d_branch, float* d_weight) {
  const int64_t size = shape.size, padded = up_to(size, LANES);
  for_each_row_back(shape, weight, d_weight, 3, [&](int64_t r, int64_t end, const float* scale,
                                                    float* d_scale, float* room) {
    float *in = room, *d_out = in + padded, *also = d_out + padded;
    fetch_row(total + r * size, size, in);
    fetch_row(d_y + r * size, size, d_out);
    if (r + AHEAD < end) {
      prefetch_to_write(d_x + (r + AHEAD) * size, size * sizeof(X));
      if (d_branch) prefetch_to_write(d_branch + (r + AHEAD) * size, size * sizeof(Branch));
    }
    normalize_backward(shape, in, d_out, scale, d_scale, inverse_root(shape, in, padded), padded);
    if (d_total) {
      fetch_row(d_total + r * size, size, also);
      for (int64_t i = 0; i < padded; i += LANES)
        store(d_out + i, load(d_out + i) + load(also + i));
    }
    narrow(d_out, size, d_x + r * size);
    if (d_branch) narrow(d_out, size, d_branch + r * size);
  });
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

template <class X, class Branch, class Y>
void add_forward_of_types(const Shape& shape, const void* x, const void* branch,
                          const float* weight, void* total, void* y) {
  add_forward(shape, static_cast<const X*>(x), static_cast<const Branch*>(branch), weight,
              static_cast<X*>(total), static_cast<Y*>(y));
}

template <class X, class Branch, class Y>
void add_backward_of_types(const Shape& shape, const void* total, const float* weight,
                           const void* d_total, const void* d_y, void* d_x, void* d_branch,
                           float* d_weight) {
  add_backward(shape, static_cast<const X*>(total), weight, static_cast<const X*>(d_total),
               static_cast<const Y*>(d_y), static_cast<X*>(d_x), static_cast<Branch*>(d_branch),
               d_weight);
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

// x, total and their gradients in one of fp32 and bf16, the branch in bf16 or as x, y and d_y in
// one of the two. d_branch is asked for where the branch's dtype is not x's.
EXPORT void add_rms_norm_forward(const Shape* shape, int x_is_bf16, int branch_is_bf16,
                                 int y_is_bf16, const void* x, const void* branch,
                                 const float* weight, void* total, void* y) {
  auto run = x_is_bf16        ? (y_is_bf16 ? add_forward_of_types<bf16, bf16, bf16>
                                           : add_forward_of_types<bf16, bf16, float>)
             : branch_is_bf16 ? (y_is_bf16 ? add_forward_of_types<float, bf16, bf16>
                                           : add_forward_of_types<float, bf16, float>)
             : y_is_bf16      ? add_forward_of_types<float, float, bf16>
                              : add_forward_of_types<float, float, float>;
  run(*shape, x, branch, weight, total, y);
}

EXPORT void add_rms_norm_backward(const Shape* shape, int x_is_bf16, int branch_is_bf16,
                                  int y_is_bf16, const void* total, const float* weight,
                                  const void* d_total, const void* d_y, void* d_x, void* d_branch,
                                  float* d_weight) {
  auto run = x_is_bf16        ? (y_is_bf16 ? add_backward_of_types<bf16, bf16, bf16>
                                           : add_backward_of_types<bf16, bf16, float>)
             : branch_is_bf16 ? (y_is_bf16 ? add_backward_of_types<float, bf16, bf16>
                                           : add_backward_of_types<float, bf16, float>)
             : y_is_bf16      ? add_backward_of_types<float, float, bf16>
                              : add_backward_of_types<float, float, float>;
  run(*shape, total, weight, d_total, d_y, d_x, d_branch, d_weight);
}
