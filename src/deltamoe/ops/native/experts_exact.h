// Experts in fp32.
//
// A token's copies are sorted by expert and cut into panels of at most 64 rows. A panel stands on
// its side: element (channel, row) at [channel * width + row]. So the weights are always a
// product's left operand, read as they lie in memory, and what one product gives is what the next
// one takes.
#pragma once

#include <memory>
#include <vector>

#include "experts_problem.h"
#include "gemm.h"

namespace {

constexpr int64_t PANEL = 64;
constexpr int64_t COLUMNS = 64;        // of a weight's gradient, made by one product
constexpr int64_t STRIPS = 5;          // of so many columns, made by one task at most
constexpr int64_t CHANNELS = 256;      // its rows
constexpr int64_t ROWS_AT_ONCE = 512;  // tokens it gathers at once
constexpr int64_t BLOCK = 48;          // channels between a product and what is done to it

struct Panel {
  int64_t expert, first, rows, width;
  int64_t offset;  // widths of the panels before
};

// Of at most `most` rows, filled up to a multiple of `round`.
std::vector<Panel> panels_of(const Problem& p, int64_t most, int64_t round) {
  std::vector<Panel> panels;
  int64_t first = 0, offset = 0;
  for (int64_t e = 0; e < p.experts; e++)
    for (int64_t left = p.counts[e]; left > 0;) {
      const int64_t rows = left < most ? left : most, width = up_to(rows, round);
      panels.push_back({e, first, rows, width, offset});
      first += rows, left -= rows, offset += width;
    }
  return panels;
}

int64_t places_of(const std::vector<Panel>& panels) {
  return panels.empty() ? 0 : panels.back().offset + panels.back().width;
}

// One matrix an expert [height, depth] in fp32, left of products; copied only if it must be.
template <class W>
class Matrices {
 public:
  Matrices(const Problem& p, const W* w, int64_t rows, int64_t columns, bool turned)
      : slot_(p.experts, -1), copies_(0), row_(turned ? rows : columns), size_(rows * columns) {
    if constexpr (std::is_same_v<W, float>) {
      if (!turned) {
        lent_ = w;
        return;
      }
    }
    const int64_t height = turned ? columns : rows;
    std::vector<int64_t> used;
    for (int64_t e = 0; e < p.experts; e++)
      if (p.counts[e]) slot_[e] = int64_t(used.size()), used.push_back(e);
    copies_ = Buffer<float>(int64_t(used.size()) * size_);
    constexpr int64_t STRIP = 32;  // lines of a copy
    const int64_t strips = (height + STRIP - 1) / STRIP, tasks = int64_t(used.size()) * strips;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
      const W* from = w + used[task / strips] * size_;
      float* to = copies_ + task / strips * size_;
      const int64_t begin = task % strips * STRIP;
      const int64_t end = begin + STRIP < height ? begin + STRIP : height;
      if (turned) turn(from, rows, columns, begin, end, to);
      else convert(from + begin * columns, (end - begin) * columns, to + begin * columns);
    }
  }

  Strided of(int64_t expert, int64_t row) const {
    const float* start = lent_ ? lent_ + expert * size_ : copies_ + slot_[expert] * size_;
    return {start + row * row_, row_, 1};
  }

 private:
  // Lines begin .. end of the copy are columns of `from`.
  static void turn(const W* from, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                   float* to) {
    alignas(64) float square[LANES * LANES] = {}, turned[LANES * LANES];
    for (int64_t c = begin; c < end; c += LANES)
      for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t wide = columns - c < LANES ? columns - c : LANES;
        const int64_t high = end - c < LANES ? end - c : LANES;
        const int64_t deep = rows - r < LANES ? rows - r : LANES;
        for (int64_t i = 0; i < deep; i++)
          convert(from + (r + i) * columns + c, wide, square + i * LANES);
        transpose_square(square, LANES, turned, LANES);
        for (int64_t j = 0; j < high; j++)
          convert(turned + j * LANES, deep, to + (c + j) * rows + r);
      }
  }

  const float* lent_ = nullptr;
  std::vector<int64_t> slot_;
  Buffer<float> copies_;
  ptrdiff_t row_;
  int64_t size_;
};

// out [M, width] = matrix [M, K] panel [K, width]
void multiply(int64_t M, int64_t K, Strided matrix, const float* panel, int64_t width, float* out) {
  gemm<Into::SET>(int(M), int(width), int(K), matrix, panel, width, out, width);
}

// ── moving numbers ───────────────────────────────────────────────────────────────────────────────

// A panel from rows of x.
template <class X>
void read_panel(const Problem& p, const X* x, const Panel& panel, float* to) {
  const int64_t room = up_to(p.dim, LANES), whole = p.dim / LANES * LANES;
  Buffer<float> rows(LANES * room), turned(LANES * LANES);
  for (int64_t first = 0; first < panel.width; first += LANES) {
    for (int64_t i = 0; i < LANES; i++) {
      float* row = rows + i * room;
      int64_t n = 0;
      if (first + LANES + i < panel.rows)
        prefetch(x + token_of(p, panel.first + first + LANES + i) * p.dim, p.dim * sizeof(X));
      if (first + i < panel.rows) {
        convert(x + token_of(p, panel.first + first + i) * p.dim, p.dim, row);
        n = p.dim;
      }
      memset(row + n, 0, (room - n) * sizeof(float));
    }
    transpose(LANES, int(whole), rows, room, to + first, panel.width);
    if (whole == p.dim) continue;
    transpose(LANES, LANES, rows + whole, room, turned, LANES);
    for (int64_t k = whole; k < p.dim; k++)
      memcpy(to + first + k * panel.width, turned + (k - whole) * LANES, LANES * sizeof(float));
  }
}

// block [channels, width] of a panel to columns of rows: to[r * to_row + c], r < rows.
void write_rows(const float* block, int64_t channels, int64_t width, int64_t rows, float* to,
                int64_t to_row) {
  alignas(64) float square[LANES * LANES];
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < channels; c += LANES) {
      if (r + LANES <= rows && c + LANES <= channels) {
        transpose_square(block + c * width + r, width, to + r * to_row + c, to_row);
        continue;
      }
      const int64_t high = channels - c < LANES ? channels - c : LANES;
      const int64_t wide = rows - r < LANES ? rows - r : LANES;
      if (c + LANES <= channels) {
        transpose_square(block + c * width + r, width, square, LANES);
      } else {
        for (int64_t i = 0; i < high; i++)
          for (int64_t j = 0; j < wide; j++) square[j * LANES + i] = block[(c + i) * width + r + j];
      }
      for (int64_t j = 0; j < wide; j++)
        memcpy(to + (r + j) * to_row + c, square + j * LANES, high * 4);
    }
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────

// `kept` may be null; backward needs the gates, then the ups, panel by panel [hidden, width].
template <class X, class W>
void forward_exactly(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                     X* y, float* kept) {
  const std::vector<Panel> panels = panels_of(p, PANEL, LANES);
  const Matrices<W> ups(p, w_up, p.hidden, p.dim, false);
  const Matrices<W> downs(p, w_down, p.dim, p.hidden, false);
  std::unique_ptr<Matrices<W>> gates;
  if (w_gate) gates = std::make_unique<Matrices<W>>(p, w_gate, p.hidden, p.dim, false);
  const int64_t kept_gates = w_gate ? places_of(panels) * p.hidden : 0;
  const bool is_direct = writes_directly<float, X>(p);
  Buffer<float> room(is_direct ? 0 : p.routed * p.dim);
  float* answers = is_direct ? reinterpret_cast<float*>(y) : room;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Buffer<float> tokens(p.dim * PANEL), between(p.hidden * PANEL);
    Buffer<float> gate(BLOCK * PANEL), up(BLOCK * PANEL);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < panels.size(); n++) {
      const Panel& panel = panels[n];
      const int64_t width = panel.width, at = panel.offset * p.hidden;
      read_panel(p, x, panel, tokens);
      for (int64_t f = 0; f < p.hidden; f += BLOCK) {
        const int64_t height = p.hidden - f < BLOCK ? p.hidden - f : BLOCK, size = height * width;
        float* hiddens = between + f * width;
        multiply(height, p.dim, ups.of(panel.expert, f), tokens, width, up);
        if (kept) memcpy(kept + kept_gates + at + f * width, up, size * sizeof(float));
        if (w_gate) {
          multiply(height, p.dim, gates->of(panel.expert, f), tokens, width, gate);
          if (kept) memcpy(kept + at + f * width, gate, size * sizeof(float));
          for (int64_t i = 0; i < size; i += LANES)
            store(hiddens + i, Swiglu(load(gate + i), load(up + i)).value());
        } else {
          memcpy(hiddens, up, size * sizeof(float));
          gelu(size, hiddens);
        }
      }
      for (int64_t d = 0; d < p.dim; d += BLOCK) {
        const int64_t height = p.dim - d < BLOCK ? p.dim - d : BLOCK;
        multiply(height, p.hidden, downs.of(panel.expert, d), between, width, up);
        write_rows(up, height, width, panel.rows, answers + panel.first * p.dim + d, p.dim);
      }
    }
  }
  if (!is_direct) combine(p, answers, true, y);
}

// ── backward ─────────────────────────────────────────────────────────────────────────────────────

// What comes of d_h, the gradient of what leaves the activation before the chosen expert's weight,
// for `channels` channels of a panel. A row's share of that weight's gradient is the sum of h d_h.
// `d_h` becomes d_up.
void swiglu_backward(int64_t channels, int64_t width, const float* gates, const float* ups,
                     const float* weights, float* d_h, float* h, float* d_gate, float* share) {
  for (int64_t i = 0; i < channels * width; i += LANES) {
    const int64_t r = i % width;
    const Swiglu at(load(gates + i), load(ups + i));
    const vec d = load(d_h + i), weight = load(weights + r);
    store(share + r, load(share + r) + at.value() * d);
    store(h + i, at.value() * weight);
    store(d_gate + i, at.d_gate(d * weight));
    store(d_h + i, at.d_up(d * weight));
  }
}

void gelu_backward(int64_t channels, int64_t width, const float* ups, const float* weights,
                   float* d_h, float* h, float* share) {
  for (int64_t i = 0; i < channels * width; i++) {
    const int64_t r = i % width;
    const Gelu at(ups[i]);
    share[r] += at.value * d_h[i];
    h[i] = at.value * weights[r];
    d_h[i] *= weights[r] * at.slope;
  }
}

// One task's share of a weight's gradient: strips of [channels, COLUMNS] of one expert, each its
// sum over rows of left [channels, row] right [row, column].
template <class X>
class Reduction {
  static constexpr int64_t STRIP = ROWS_AT_ONCE * COLUMNS;

 public:
  explicit Reduction(const Problem& p) : p_(p), right_(STRIPS * STRIP) {}

  // Gather strips of columns of the rows of some panels of one expert: a row's lie together, so
  // one wait for a far row serves them all.
  void gather(const X* x, int64_t column, int64_t strips, const Panel* panels, int64_t count) {
    constexpr int64_t AHEAD = 8;
    const int64_t end = column + strips * COLUMNS < p_.dim ? column + strips * COLUMNS : p_.dim;
    const auto row = [&](const Panel& panel, int64_t r) {
      return x + token_of(p_, panel.first + r) * p_.dim;
    };
    float* to = right_;
    for (const Panel* panel = panels; panel < panels + count; panel++)
      for (int64_t r = 0; r < panel->width; r++, to += COLUMNS) {
        if (r + AHEAD < panel->rows)
          prefetch(row(*panel, r + AHEAD) + column, (end - column) * sizeof(X));
        for (int64_t c = column, s = 0; c < end; c += COLUMNS, s++) {
          int64_t size = end - c < COLUMNS ? end - c : COLUMNS;
          if (r < panel->rows) convert(row(*panel, r) + c, size, to + s * STRIP);
          else size = 0;
          memset(to + s * STRIP + size, 0, (COLUMNS - size) * sizeof(float));
        }
      }
  }

  // sum [channels, COLUMNS] = (or +=) left right, for channels from `first` on.
  void multiply(int64_t channels, int64_t first, const float* left, int64_t strip,
                const Panel* panels, int64_t count, bool adds, float* sum) const {
    const float* right = right_ + strip * STRIP;
    for (const Panel* panel = panels; panel < panels + count; panel++, adds = true) {
      const Strided rows{left + panel->offset * p_.hidden + first * panel->width, panel->width, 1};
      auto run = adds ? gemm<Into::ADD> : gemm<Into::SET>;
      run(int(channels), COLUMNS, int(panel->rows), rows, right, COLUMNS, sum, COLUMNS, nullptr);
      right += panel->width * COLUMNS;
    }
  }

 private:
  const Problem& p_;
  Buffer<float> right_;
};

template <class X, class W>
void backward_exactly(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                      const Gradients& d) {
  const std::vector<Panel> panels = panels_of(p, PANEL, LANES);
  const int64_t size = places_of(panels) * p.hidden;
  const X* d_y = static_cast<const X*>(d.y);
  const float* kept_gates = static_cast<const float*>(d.kept);
  const float* kept_ups = kept_gates + (w_gate ? size : 0);
  // As left operands over rows: [hidden, width] of each panel.
  Buffer<float> d_gates(w_gate ? size : 0), d_ups(size), hiddens(size);
  const bool is_direct = writes_directly<float, X>(p);
  Buffer<float> room(is_direct || !d.x ? 0 : p.routed * p.dim);
  float* d_rows = is_direct ? static_cast<float*>(d.x) : room;
  {
    const Matrices<W> ups(p, w_up, p.hidden, p.dim, true);
    const Matrices<W> downs(p, w_down, p.dim, p.hidden, true);
    std::unique_ptr<Matrices<W>> gates;
    if (w_gate) gates = std::make_unique<Matrices<W>>(p, w_gate, p.hidden, p.dim, true);
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
      Buffer<float> answers(p.dim * PANEL), block(BLOCK * PANEL);
      alignas(64) float weights[PANEL], share[PANEL];
#pragma omp for schedule(dynamic)
      for (size_t n = 0; n < panels.size(); n++) {
        const Panel& panel = panels[n];
        const int64_t width = panel.width, at = panel.offset * p.hidden;
        read_panel(p, d_y, panel, answers);
        for (int64_t r = 0; r < width; r++) {
          weights[r] = r < panel.rows ? weight_of(p, panel.first + r) : 0.f;
          share[r] = 0.f;
        }
        for (int64_t f = 0; f < p.hidden; f += BLOCK) {
          const int64_t height = p.hidden - f < BLOCK ? p.hidden - f : BLOCK;
          const int64_t here = at + f * width;
          multiply(height, p.dim, downs.of(panel.expert, f), answers, width, d_ups + here);
          if (w_gate)
            swiglu_backward(height, width, kept_gates + here, kept_ups + here, weights,
                            d_ups + here, hiddens + here, d_gates + here, share);
          else
            gelu_backward(height, width, kept_ups + here, weights, d_ups + here, hiddens + here,
                          share);
        }
        if (d.weights)
          for (int64_t r = 0; r < panel.rows; r++)
            d.weights[p.assignments ? p.assignments[panel.first + r] : panel.first + r] = share[r];
        if (!d.x) continue;
        for (int64_t c = 0; c < p.dim; c += BLOCK) {
          const int64_t height = p.dim - c < BLOCK ? p.dim - c : BLOCK;
          multiply(height, p.hidden, ups.of(panel.expert, c), d_ups + at, width, block);
          if (w_gate)
            gemm<Into::ADD>(int(height), int(width), int(p.hidden), gates->of(panel.expert, c),
                            d_gates + at, width, block, width);
          write_rows(block, height, width, panel.rows, d_rows + panel.first * p.dim + c, p.dim);
        }
      }
    }
  }
  if (d.x && !is_direct) combine(p, d_rows, false, static_cast<X*>(d.x));
  if (!d.w_up) return;

  // Each expert's panels are neighbours.
  std::vector<int64_t> start(p.experts + 1, 0);
  for (const Panel& panel : panels) start[panel.expert + 1]++;
  for (int64_t e = 0; e < p.experts; e++) start[e + 1] += start[e];
  const int64_t heights = (p.hidden + CHANNELS - 1) / CHANNELS;
  // With few experts the strips are what threads share.
  const int64_t strips = p.experts * heights < 4 * p.threads ? 1 : STRIPS;
  const int64_t widths = (p.dim + strips * COLUMNS - 1) / (strips * COLUMNS);
  const int64_t tasks = p.experts * widths * heights;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Reduction<X> reduction(p);
    constexpr int64_t SIZE = CHANNELS * COLUMNS;
    Buffer<float> d_gate(strips * SIZE), d_up(strips * SIZE), d_down(strips * SIZE), turned(SIZE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t e = task / (widths * heights);
      const int64_t begin = task / heights % widths * strips * COLUMNS;
      const int64_t left = (p.dim - begin + COLUMNS - 1) / COLUMNS;
      const int64_t mine = left < strips ? left : strips;
      const int64_t first = task % heights * CHANNELS;
      const int64_t channels = p.hidden - first < CHANNELS ? p.hidden - first : CHANNELS;
      if (start[e] == start[e + 1])
        for (Buffer<float>* sums : {&d_gate, &d_up, &d_down}) memset(*sums, 0, mine * SIZE * 4);
      constexpr int64_t AT_ONCE = ROWS_AT_ONCE / PANEL;
      for (int64_t i = start[e]; i < start[e + 1]; i += AT_ONCE) {
        const Panel* some = panels.data() + i;
        const int64_t count = start[e + 1] - i < AT_ONCE ? start[e + 1] - i : AT_ONCE;
        const auto sum = [&](const float* rows, float* to) {
          for (int64_t s = 0; s < mine; s++)
            reduction.multiply(channels, first, rows, s, some, count, i > start[e], to + s * SIZE);
        };
        reduction.gather(x, begin, mine, some, count);
        if (w_gate) sum(d_gates, d_gate);
        sum(d_ups, d_up);
        reduction.gather(d_y, begin, mine, some, count);
        sum(hiddens, d_down);
      }
      for (int64_t s = 0; s < mine; s++) {
        const int64_t column = begin + s * COLUMNS;
        const int64_t wide = p.dim - column < COLUMNS ? p.dim - column : COLUMNS;
        const int64_t at = (e * p.hidden + first) * p.dim + column;
        const auto give = [&](const float* sum, void* to) {
          for (int64_t c = 0; c < channels; c++)
            convert(sum + s * SIZE + c * COLUMNS, wide, static_cast<W*>(to) + at + c * p.dim);
        };
        if (w_gate) give(d_gate, d.w_gate);
        give(d_up, d.w_up);
        write_rows(d_down + s * SIZE, channels, COLUMNS, wide, turned, CHANNELS);
        for (int64_t c = 0; c < wide; c++)
          convert(turned + c * CHANNELS, channels,
                  static_cast<W*>(d.w_down) + (e * p.dim + column + c) * p.hidden + first);
      }
    }
  }
}

}  // namespace
