// The short causal convolution and its SiLU, forward and backward; see ops/short_conv.
//
//   c[t] = sum_j weight[j] x[t - (W - 1) + j]     s = silu(c)
//   y[t] = s[t], or head by head  scale s[t] / sqrt(|s[t]|^2 + eps)
//
// The work is cut into chunks of one sequence's tokens, and into strips of channels (one head each
// where heads are normalised). A tile of a strip is brought into fp32 beside this core, together
// with the W - 1 inputs before it, so that what lies before a sequence's start matters in one place
// only. The backward pass keeps nothing but x and computes the rest again. Every sum is taken in an
// order that the number of threads does not change.

#include <cmath>
#include <cstddef>
#include <vector>

#include "buffer.h"
#include "vector.h"

namespace {

constexpr int64_t CHUNK = 512;  // tokens whose share of d_weight is summed by one thread
constexpr int64_t TILE = 64;    // tokens brought near at once
constexpr int64_t STRIP = 64;   // channels brought near at once, where heads do not matter
constexpr int64_t AHEAD = 16;   // tokens whose outputs' lines of the cache are asked for early

struct Chunk {
  int64_t sequence, begin, end;  // tokens, counted from the sequence's first
  int64_t length, first_row;     // of the sequence
  int64_t x_offset;              // where the sequence begins in x
};

// Filled in by _Shape of ops/short_conv/native.py.
struct Shape {
  int64_t batch, time, channels, width;
  int64_t x_batch, x_row;  // strides
  int64_t num_borders;     // 0: each row of the batch is a sequence
  const int64_t* borders;
  int64_t head_dim;  // 0: no normalisation
  float scale, eps;
  int64_t threads;
};

std::vector<Chunk> chunks_of(const Shape& shape) {
  std::vector<Chunk> chunks;
  int64_t sequences = shape.num_borders ? shape.num_borders - 1 : shape.batch;
  for (int64_t n = 0; n < sequences; n++) {
    int64_t first = shape.num_borders ? shape.borders[n] : n * shape.time;
    int64_t length = shape.num_borders ? shape.borders[n + 1] - first : shape.time;
    int64_t offset = shape.num_borders ? first * shape.x_row : n * shape.x_batch;
    for (int64_t t = 0; t < length; t += CHUNK)
      chunks.push_back({n, t, t + CHUNK < length ? t + CHUNK : length, length, first, offset});
  }
  return chunks;
}

// One strip of channels in fp32; columns up to `padded` are zero.
struct Strip {
  int64_t first, size, padded, width;
  std::vector<float> weight;  // [width, padded]

  Strip(const Shape& shape, const float* taps, int64_t index) {
    int64_t step = shape.head_dim ? shape.head_dim : STRIP;
    first = index * step;
    size = shape.channels - first < step ? shape.channels - first : step;
    padded = up_to(size, LANES);
    width = shape.width;
    weight.assign(width * padded, 0.f);
    for (int64_t c = 0; c < size; c++)
      for (int64_t j = 0; j < width; j++)
        weight[j * padded + c] = taps[(first + c) * width + j];
  }
};

int64_t num_strips(const Shape& shape) {
  int64_t step = shape.head_dim ? shape.head_dim : STRIP;
  return (shape.channels + step - 1) / step;
}

template <class T>
void fetch_row(const T* from, const Strip& strip, float* to) {
  widen(from, strip.size, to);
  for (int64_t c = strip.size; c < strip.padded; c++) to[c] = 0.f;
}

// Inputs begin - (W - 1) .. end of a sequence, its past in front of it.
template <class X>
void fetch_inputs(const Shape& shape, const Chunk& chunk, const Strip& strip, const X* x,
                  const X* past, int64_t begin, int64_t end, float* to) {
  for (int64_t t = begin - (strip.width - 1); t < end; t++, to += strip.padded) {
    if (t + TILE < chunk.end)
      prefetch(x + chunk.x_offset + (t + TILE) * shape.x_row + strip.first, strip.size * sizeof(X));
    if (t >= 0) {
      fetch_row(x + chunk.x_offset + t * shape.x_row + strip.first, strip, to);
    } else if (past) {
      int64_t row = chunk.sequence * (strip.width - 1) + strip.width - 1 + t;
      fetch_row(past + row * shape.channels + strip.first, strip, to);
    } else {
      for (int64_t c = 0; c < strip.padded; c++) to[c] = 0.f;
    }
  }
}

// The taps of LANES channels; W is 0 where the width is known only now. A loop over tokens that
// makes this before it begins has them in registers.
template <int W>
struct Taps {
  const float* weight;
  int64_t padded, width;
  vec kept[W ? W : 1];

  Taps(const Strip& strip, int64_t i)
      : weight(strip.weight.data() + i), padded(strip.padded), width(W ? W : strip.width) {
    for (int j = 0; j < W; j++) kept[j] = load(weight + j * padded);
  }
  vec tap(int64_t j) const { return W ? kept[j] : load(weight + j * padded); }

  // The sum over the taps whose oldest input is at x.
  vec forward(const float* x) const {
    vec total{};
    for (int64_t j = 0; j < width; j++) total += tap(j) * load(x + j * padded);
    return total;
  }
  // What this token's sum and the W - 1 behind it ask of its input.
  vec backward(const float* d_c) const {
    vec total{};
    for (int64_t j = 0; j < width; j++) total += tap(j) * load(d_c + (width - 1 - j) * padded);
    return total;
  }
};

// A tile goes through one column of LANES channels after the other, token by token: a token's
// numbers wait for none of its neighbours'. What a whole head decides comes in a second pass.
template <int W, class X, class Y>
void forward(const Shape& shape, const X* x, const float* weight, const X* past, Y* y) {
  const std::vector<Chunk> chunks = chunks_of(shape);
  const int64_t strips = num_strips(shape), tasks = int64_t(chunks.size()) * strips;
#pragma omp parallel for num_threads(shape.threads) schedule(dynamic) if (shape.threads > 1)
  for (int64_t task = 0; task < tasks; task++) {
    const Chunk& chunk = chunks[task / strips];
    const Strip strip(shape, weight, task % strips);
    const int64_t padded = strip.padded;
    std::vector<float> room((2 * TILE + strip.width - 1) * padded + TILE * LANES);
    float *squares = room.data(), *s = squares + TILE * LANES, *inputs = s + TILE * padded;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
      const int64_t end = begin + TILE < chunk.end ? begin + TILE : chunk.end;
      const int64_t tokens = end - begin;
      fetch_inputs(shape, chunk, strip, x, past, begin, end, inputs);
      for (int64_t i = 0; i < padded; i += LANES) {
        const Taps<W> taps(strip, i);
        for (int64_t t = 0; t < tokens; t++) {
          const vec c = taps.forward(inputs + t * padded + i);
          const vec answer = c * sigmoid_lanes(c);
          store(s + t * padded + i, answer);
          if (!shape.head_dim) continue;
          const vec before = i ? load(squares + t * LANES) : vec{};
          store(squares + t * LANES, before + answer * answer);
        }
      }
      for (int64_t t = 0; t < tokens; t++) {
        Y* to = y + (chunk.first_row + begin + t) * shape.channels + strip.first;
        if (begin + t + AHEAD < chunk.end)
          prefetch_to_write(to + AHEAD * shape.channels, strip.size * sizeof(Y));
        if (shape.head_dim) {
          const float length = std::sqrt(sum(load(squares + t * LANES)) + shape.eps);
          const vec factor = splat(shape.scale / length);
          for (int64_t i = 0; i < padded; i += LANES)
            store(s + t * padded + i, load(s + t * padded + i) * factor);
        }
        narrow(s + t * padded, strip.size, to);
      }
    }
  }
}

// From the inputs and d_y of one token to d_c; `s` and `slope` are rows of room.
template <int W, class Y>
inline void gradient_of_sum(const Shape& shape, const Strip& strip, const float* x, const Y* d_y,
                            float* s, float* slope, float* d_c) {
  fetch_row(d_y, strip, d_c);
  const vec one = splat(1.f);
  for (int64_t i = 0; i < strip.padded; i += LANES) {
    const vec c = Taps<W>(strip, i).forward(x + i), opening = sigmoid_lanes(c);
    store(s + i, c * opening);
    store(slope + i, opening * (one + c * (one - opening)));
  }
  if (shape.head_dim) {
    vec squares{}, products{};
    for (int64_t i = 0; i < strip.padded; i += LANES) {
      squares += load(s + i) * load(s + i);
      products += load(s + i) * load(d_c + i);
    }
    float inverse = 1.f / std::sqrt(sum(squares) + shape.eps);
    vec straight = splat(shape.scale * inverse);
    vec along = splat(shape.scale * inverse * inverse * inverse * sum(products));
    for (int64_t i = 0; i < strip.padded; i += LANES)
      store(d_c + i, load(d_c + i) * straight - load(s + i) * along);
  }
  for (int64_t i = 0; i < strip.padded; i += LANES) store(d_c + i, load(d_c + i) * load(slope + i));
}

// share[j] += sum over the tokens t of d_c[t] x[t + j]
template <int W>
void add_share(const Strip& strip, const float* d_c, const float* x, int64_t tokens, float* share) {
  constexpr int64_t AT_ONCE = W ? W : 1;  // sums that do not wait for each other
  const int64_t padded = strip.padded;
  for (int64_t j = 0; j < strip.width; j += AT_ONCE)
    for (int64_t i = 0; i < padded; i += LANES) {
      vec total[AT_ONCE];
      for (int64_t n = 0; n < AT_ONCE; n++) total[n] = load(share + (j + n) * padded + i);
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t n = 0; n < AT_ONCE; n++)
          total[n] += load(d_c + t * padded + i) * load(x + (t + j + n) * padded + i);
      for (int64_t n = 0; n < AT_ONCE; n++) store(share + (j + n) * padded + i, total[n]);
    }
}

template <int W, class X, class Y>
void backward(const Shape& shape, const X* x, const float* weight, const X* past, const Y* d_y,
              X* d_x, float* d_weight, X* d_past) {
  const std::vector<Chunk> chunks = chunks_of(shape);
  const int64_t strips = num_strips(shape), tasks = int64_t(chunks.size()) * strips;
  const int64_t width = shape.width, extra = width - 1;
  std::vector<float> shares(chunks.size() * width * shape.channels);  // of d_weight
#pragma omp parallel for num_threads(shape.threads) schedule(dynamic) if (shape.threads > 1)
  for (int64_t task = 0; task < tasks; task++) {
    const Chunk& chunk = chunks[task / strips];
    const Strip strip(shape, weight, task % strips);
    const int64_t padded = strip.padded;
    std::vector<float> inputs((TILE + 2 * extra) * padded), gradients((TILE + extra) * padded);
    std::vector<float> rows(2 * padded), share(width * padded);
    float *s = rows.data(), *slope = s + padded;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
      int64_t end = begin + TILE < chunk.end ? begin + TILE : chunk.end;
      // The last inputs of the tile also entered the next tokens' sums.
      int64_t reach = end + extra < chunk.length ? end + extra : chunk.length;
      fetch_inputs(shape, chunk, strip, x, past, begin, reach, inputs.data());
      for (int64_t t = begin; t < reach; t++) {
        const int64_t at = (chunk.first_row + t) * shape.channels + strip.first;
        if (t + TILE < chunk.end)
          prefetch(d_y + at + TILE * shape.channels, strip.size * sizeof(Y));
        if (t < end) prefetch_to_write(d_x + at, strip.size * sizeof(X));
        gradient_of_sum<W>(shape, strip, inputs.data() + (t - begin) * padded, d_y + at, s, slope,
                           gradients.data() + (t - begin) * padded);
      }
      for (int64_t t = reach; t < end + extra; t++)
        for (int64_t i = 0; i < padded; i++) gradients[(t - begin) * padded + i] = 0.f;

      add_share<W>(strip, gradients.data(), inputs.data(), end - begin, share.data());
      // Token t entered the sums of t .. t + W - 1, the last of them through the oldest tap.
      for (int64_t t = begin; t < end; t++) {
        const float* d_c = gradients.data() + (t - begin) * padded;
        for (int64_t i = 0; i < padded; i += LANES)
          store(s + i, Taps<W>(strip, i).backward(d_c + i));
        narrow(s, strip.size, d_x + (chunk.first_row + t) * shape.channels + strip.first);
      }
      if (d_past && begin == 0) {
        for (int64_t p = 0; p < extra; p++) {
          for (int64_t i = 0; i < padded; i++) s[i] = 0.f;
          for (int64_t j = 0; j <= p; j++)
            if (p - j < reach)
              for (int64_t i = 0; i < padded; i++)
                s[i] += strip.weight[j * padded + i] * gradients[(p - j) * padded + i];
          int64_t row = chunk.sequence * extra + p;
          narrow(s, strip.size, d_past + row * shape.channels + strip.first);
        }
      }
    }
    float* mine = shares.data() + (task / strips) * width * shape.channels;
    for (int64_t j = 0; j < width; j++)
      narrow(share.data() + j * padded, strip.size, mine + j * shape.channels + strip.first);
  }
  for (int64_t i = 0; i < width * shape.channels; i++) {
    float total = 0.f;
    for (size_t n = 0; n < chunks.size(); n++) total += shares[n * width * shape.channels + i];
    d_weight[i % shape.channels * width + i / shape.channels] = total;
  }
}

template <class X, class Y>
void forward_of_width(const Shape& shape, const void* x, const float* weight, const void* past,
                      void* y) {
  auto run = shape.width == 4 ? forward<4, X, Y> : forward<0, X, Y>;
  run(shape, static_cast<const X*>(x), weight, static_cast<const X*>(past), static_cast<Y*>(y));
}

template <class X, class Y>
void backward_of_width(const Shape& shape, const void* x, const float* weight, const void* past,
                       const void* d_y, void* d_x, float* d_weight, void* d_past) {
  auto run = shape.width == 4 ? backward<4, X, Y> : backward<0, X, Y>;
  run(shape, static_cast<const X*>(x), weight, static_cast<const X*>(past),
      static_cast<const Y*>(d_y), static_cast<X*>(d_x), d_weight, static_cast<X*>(d_past));
}

}  // namespace

// x and past in fp32 or bf16, y likewise; normalised heads are written in fp32.
EXPORT void short_conv_forward(const Shape* shape, int is_bf16, const void* x, const float* weight,
                               const void* past, void* y) {
  auto run = !is_bf16          ? forward_of_width<float, float>
             : shape->head_dim ? forward_of_width<bf16, float>
                               : forward_of_width<bf16, bf16>;
  run(*shape, x, weight, past, y);
}

// d_past may be null; d_x is contiguous.
EXPORT void short_conv_backward(const Shape* shape, int is_bf16, const void* x, const float* weight,
                                const void* past, const void* d_y, void* d_x, float* d_weight,
                                void* d_past) {
  auto run = !is_bf16          ? backward_of_width<float, float>
             : shape->head_dim ? backward_of_width<bf16, float>
                               : backward_of_width<bf16, bf16>;
  run(*shape, x, weight, past, d_y, d_x, d_weight, d_past);
}
