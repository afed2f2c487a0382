// Experts that a few rows chose, as when decoding, in fp32: each weight is read once.
#pragma once

#include "experts_exact.h"

namespace {

constexpr int64_t FEW = 4;      // rows of one expert
constexpr int64_t LINES = 32;   // of a matrix: one task's share

// out[r * out_row + m] = sum_k w[m, k] x[r * depth + k]
template <int ROWS, int HIGH, class W>
void dot(const W* w, int64_t depth, const float* x, float* out, int64_t out_row) {
  vec total[HIGH][ROWS] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    vec right[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) right[r] = load(x + r * depth + k);
#pragma GCC unroll 4
    for (int m = 0; m < HIGH; m++) {
      const vec left = load_wide(w + m * depth + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) total[m][r] += left * right[r];
    }
  }
  for (int m = 0; m < HIGH; m++)
    for (int r = 0; r < ROWS; r++) {
      float result = sum(total[m][r]);
      for (int64_t i = k; i < depth; i++) result += to_float(w[m * depth + i]) * x[r * depth + i];
      out[r * out_row + m] = result;
    }
}

template <int ROWS, class W>
void dots(const W* w, int64_t lines, int64_t depth, const float* x, float* out, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= lines; m += 4) dot<ROWS, 4>(w + m * depth, depth, x, out + m, out_row);
  for (; m < lines; m++) dot<ROWS, 1>(w + m * depth, depth, x, out + m, out_row);
}

template <class W>
void few_dots(int64_t rows, const W* w, int64_t lines, int64_t depth, const float* x, float* out,
              int64_t out_row) {
  auto run = rows == 1 ? dots<1, W> : rows == 2 ? dots<2, W> : rows == 3 ? dots<3, W> : dots<4, W>;
  run(w, lines, depth, x, out, out_row);
}

bool has_few_rows(const Problem& p) {
  for (int64_t e = 0; e < p.experts; e++)
    if (p.counts[e] > FEW) return false;
  return true;
}

template <class X, class W>
void forward_few(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                 X* y) {
  const std::vector<Panel> panels = panels_of(p, FEW, 1);
  const int64_t dim = p.dim, hidden = p.hidden, count = int64_t(panels.size());
  Buffer<float> tokens(p.routed * dim), between(p.routed * hidden), answers(p.routed * dim);
  for (int64_t row = 0; row < p.routed; row++)
    convert(x + token_of(p, row) * dim, dim, tokens + row * dim);
  const int64_t shares = (hidden + LINES - 1) / LINES, parts = (dim + LINES - 1) / LINES;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    float gate[FEW * LINES], up[FEW * LINES];
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < count * shares; task++) {
      const Panel& panel = panels[task / shares];
      const int64_t f = task % shares * LINES, size = hidden - f < LINES ? hidden - f : LINES;
      const int64_t at = (panel.expert * hidden + f) * dim;
      const float* rows = tokens + panel.first * dim;
      few_dots(panel.rows, w_up + at, size, dim, rows, up, LINES);
      if (w_gate) few_dots(panel.rows, w_gate + at, size, dim, rows, gate, LINES);
      for (int64_t r = 0; r < panel.rows; r++) {
        float* hiddens = up + r * LINES;
        if (!w_gate) gelu(size, hiddens);
        else
          for (int64_t i = 0; i < size; i += LANES)
            store(hiddens + i, Swiglu(load(gate + r * LINES + i), load(hiddens + i)).value());
        memcpy(between + (panel.first + r) * hidden + f, hiddens, size * 4);
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < count * parts; task++) {
      const Panel& panel = panels[task / parts];
      const int64_t d = task % parts * LINES, size = dim - d < LINES ? dim - d : LINES;
      few_dots(panel.rows, w_down + (panel.expert * dim + d) * hidden, size, hidden,
               between + panel.first * hidden, answers + panel.first * dim + d, dim);
    }
  }
  combine(p, static_cast<float*>(answers), true, y);
}

}  // namespace
