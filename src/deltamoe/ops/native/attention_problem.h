// Causal attention's tensors, and how rows of one head come and go.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vector.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// A tensor [tokens, heads, channels] with touching channels.
struct Part {
  void* data;
  int64_t row, head, size;

  template <class X>
  X* at(int64_t token, int64_t which) const {
    return static_cast<X*>(data) + token * row + which * head;
  }
};

// Filled in by _Inputs of ops/attention/native.py.
struct Inputs {
  Part q, q_shared, k, k_shared, v;  // k_shared.head is 0
  int64_t heads, num_borders;
  const int64_t* borders;
  float scale;
  int64_t threads;

  Part none() const { return {v.data, 0, 0, 0}; }
};

struct Task {
  int64_t first, length, head, begin, end;  // of the sequence in the rows; the queries to answer
};

// One task a head and `group` queries of a sequence, or all of them if that is 0.
std::vector<Task> tasks_of(const Inputs& in, int64_t group) {
  std::vector<Task> tasks;
  for (int64_t n = 0; n + 1 < in.num_borders; n++) {
    int64_t first = in.borders[n], length = in.borders[n + 1] - first;
    int64_t step = group ? group : length;
    for (int64_t begin = 0; begin < length; begin += step)
      for (int64_t head = 0; head < in.heads; head++)
        tasks.push_back({first, length, head, begin, std::min(begin + step, length)});
  }
  return tasks;
}

template <class X>
void narrow_scaled(const float* from, int64_t size, float scale, X* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store_narrow(to + i, load(from + i) * splat(scale));
  for (; i < size; i++) to[i] = from_float<X>(from[i] * scale);
}

// Rows first .. first + count of one head, both parts side by side, into to [count, width].
template <class X>
void fetch(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, float* to,
           int64_t width) {
  for (int64_t r = 0; r < count; r++, to += width) {
    widen(a.at<X>(first + r, head), a.size, to);
    widen(b.at<X>(first + r, head), b.size, to + a.size);
    for (int64_t i = a.size + b.size; i < width; i++) to[i] = 0.f;
  }
}

template <class X>
void give_back(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head,
               float scale, const float* from, int64_t width) {
  for (int64_t r = 0; r < count; r++, from += width) {
    narrow_scaled(from, a.size, scale, a.at<X>(first + r, head));
    narrow_scaled(from + a.size, b.size, scale, b.at<X>(first + r, head));
  }
}

}  // namespace
