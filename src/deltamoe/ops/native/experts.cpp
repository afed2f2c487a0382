// Feed-forward experts over the tokens that chose them, forward and backward.
//
//   y[n] = sum_a weight[n, a] w_down[e] (silu(w_gate[e] x[n]) * (w_up[e] x[n]))   e = chosen[n, a]
//
// (w_down gelu(w_up x) without w_gate). A dense channel is one expert that everyone visits.
//
// A token's copies are sorted by expert and cut into panels of at most 64 rows. A panel stands on
// its side: element (channel, row) at [channel * width + row]. So the weights are always a
// product's left operand, read as they lie in memory, and what one product gives is what the next
// one takes. A row's answer does not depend on its neighbours, and nothing on the threads.
//
// Products are in fp32, or in bf16 on AMX's tiles with sums in fp32: `Fp32` and `Tiled`.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL = 64;
constexpr int64_t COLUMNS = 64;        // of a weight's gradient, made by one product
constexpr int64_t STRIPS = 5;          // of so many columns, made by one task at most
constexpr int64_t CHANNELS = 256;      // its rows
constexpr int64_t ROWS_AT_ONCE = 512;  // tokens it gathers at once
constexpr int64_t BLOCK = 48;          // channels between a product and what is done to it

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Problem {
  int64_t tokens, choices, experts, dim, hidden;
  int64_t routed;               // rows: copies of tokens
  int64_t threads;
  const int64_t* counts;        // [experts] rows of each
  const int64_t* assignments;   // [routed] token * choices + choice; null: row r is token r
  const int64_t* rows;          // [tokens * choices] the inverse, `routed` for none; null likewise
  const float* weights;         // [tokens * choices]; null for 1
};

template <class T>
class Buffer {  // uninitialised, aligned
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(aligned_alloc(64, rounded(size * sizeof(T) + 64, 64))), &free) {}
  operator T*() const { return data_.get(); }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

struct Panel {
  int64_t expert, first, rows, width;
  int64_t offset;  // widths of the panels before
};

// One panel's part of a sum over rows: left [channels, width] right [rows, COLUMNS].
template <class E>
struct Term {
  const E *left, *right;
  int64_t rows, width;
};

// ── two ways to multiply ─────────────────────────────────────────────────────────────────────────

struct Fp32 {
  using Element = float;
  static constexpr int64_t ROUND = LANES;  // a panel's width is a multiple
  static constexpr int64_t block = BLOCK;
  static constexpr bool IS_TILED = false;
  static int64_t padded(int64_t channels) { return channels; }

  struct Matrix {
    const float* p;
    ptrdiff_t row;
    Matrix from(int64_t m) const { return {p + m * row, row}; }
  };

  // out [M, width] = matrix [M, K] panel [K, width]
  static void multiply(int64_t M, int64_t K, Matrix a, const float* panel, int64_t width,
                       float* out) {
    const Strided left{a.p, a.row, 1};
    gemm<Into::SET>(M, width, K, left, panel, width, out, width);
  }

  // out = a p + b q
  static void multiply_both(int64_t M, int64_t K, Matrix a, const float* p, Matrix b,
                            const float* q, int64_t width, float* out) {
    multiply(M, K, a, p, width, out);
    gemm<Into::ADD>(M, width, K, {b.p, b.row, 1}, q, width, out, width);
  }

  // sum [M, COLUMNS] = (or +=) all terms
  static void reduce(int64_t M, const std::vector<Term<float>>& terms, float* sum, bool adds) {
    for (const Term<float>& t : terms) {
      const Strided left{t.left, t.width, 1};
      if (adds) gemm<Into::ADD>(M, COLUMNS, t.rows, left, t.right, COLUMNS, sum, COLUMNS);
      else gemm<Into::SET>(M, COLUMNS, t.rows, left, t.right, COLUMNS, sum, COLUMNS);
      adds = true;
    }
  }

  // fp32 [channels, width] to a product's next right operand, and two rows to a sum's.
  static void to_panel(const float* from, int64_t channels, int64_t width, float* to) {
    memcpy(to, from, channels * width * 4);
  }
  static void pair_rows(const float* first, const float* second, float* to) {
    memcpy(to, first, COLUMNS * 4);
    memcpy(to + COLUMNS, second, COLUMNS * 4);
  }
};

#if HAS_TILES
// 32 numbers of each of two rows, taken in turn.
void interleave(const bf16* first, const bf16* second, bf16* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
}
struct Tiled {
  using Element = bf16;
  static constexpr int64_t ROUND = 32;
  static constexpr int64_t block = 32;
  static constexpr bool IS_TILED = true;
  static int64_t padded(int64_t channels) { return rounded(channels, 32); }

  struct Matrix {
    const bf16* p;
    ptrdiff_t row;
    Matrix from(int64_t m) const { return {p + m * row, row}; }
  };

  static void multiply(int64_t M, int64_t K, Matrix a, const bf16* panel, int64_t width,
                       float* out) {
    const Stretch all{a.p, a.row, panel, K};
    amx_gemm(M, width, &all, 1, 2 * width, out, width, false);
  }

  static void multiply_both(int64_t M, int64_t K, Matrix a, const bf16* p, Matrix b,
                            const bf16* q, int64_t width, float* out) {
    const Stretch both[] = {{a.p, a.row, p, K}, {b.p, b.row, q, K}};
    amx_gemm(M, width, both, 2, 2 * width, out, width, false);
  }

  static void reduce(int64_t M, const std::vector<Term<bf16>>& terms, float* sum, bool adds) {
    std::vector<Stretch> stretches;
    for (const Term<bf16>& t : terms) stretches.push_back({t.left, t.width, t.right, t.width});
    amx_gemm(M, COLUMNS, stretches.data(), int64_t(stretches.size()), 2 * COLUMNS, sum, COLUMNS,
             adds);
  }

  static void to_panel(const float* from, int64_t channels, int64_t width, bf16* to) {
    for (int64_t c = 0; c < channels; c += 2, from += 2 * width)
      for (int64_t r = 0; r < width; r += 16, to += 32)
        _mm512_storeu_si512(to, bf16_pairs(load(from + r), load(from + width + r)));
  }

  static void pair_rows(const bf16* first, const bf16* second, bf16* to) {
    for (int64_t c = 0; c < COLUMNS; c += 32) interleave(first + c, second + c, to + 2 * c);
  }
};

#endif

std::vector<Panel> panels_of(const Problem& p, int64_t round) {
  std::vector<Panel> panels;
  int64_t first = 0, offset = 0;
  for (int64_t e = 0; e < p.experts; e++)
    for (int64_t left = p.counts[e]; left > 0;) {
      int64_t rows = left < PANEL ? left : PANEL, width = rounded(rows, round);
      panels.push_back({e, first, rows, width, offset});
      first += rows, left -= rows, offset += width;
    }
  return panels;
}

// ── moving numbers ───────────────────────────────────────────────────────────────────────────────

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

// Panels of `channels` channels from rows of x; `token(r)` says which row of x stands at r.
template <class P, class X, class Token>
void read_panel(const X* x, int64_t dim, const Panel& panel, Token token,
                typename P::Element* to) {
  using E = typename P::Element;
  // In bf16 two channels move as one fp32 number: so they end up side by side.
  const int64_t channels = rounded(P::padded(dim), LANES * int64_t(4 / sizeof(E)));
  const int64_t words = channels * sizeof(E) / 4, real = P::padded(dim) * sizeof(E) / 4;
  Buffer<E> rows(LANES * channels);
  Buffer<float> turned(words * LANES);
  for (int64_t first = 0; first < panel.width; first += LANES) {
    for (int64_t i = 0; i < LANES; i++) {
      E* row = rows + i * channels;
      int64_t n = 0;
      if (first + LANES + i < panel.rows)
        prefetch(x + token(panel.first + first + LANES + i) * dim, dim * sizeof(X));
      if (first + i < panel.rows) {
        convert(x + token(panel.first + first + i) * dim, dim, row);
        n = dim;
      }
      memset(row + n, 0, (channels - n) * sizeof(E));
    }
    auto* from = reinterpret_cast<const float*>(static_cast<E*>(rows));
    auto* out = reinterpret_cast<float*>(to) + first;
    const int64_t whole = real / LANES * LANES;
    transpose(LANES, whole, from, words, out, panel.width);
    if (whole < real) {
      transpose(LANES, LANES, from + whole, words, turned, LANES);
      for (int64_t k = whole; k < real; k++)
        memcpy(out + k * panel.width, turned + (k - whole) * LANES, LANES * 4);
    }
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

#if HAS_TILES
// The same in bf16; the block has 32 channels, of which `channels` are written.
void write_rows(const float* block, int64_t channels, int64_t width, int64_t rows, bf16* to,
                int64_t to_row) {
  alignas(64) float pairs[16 * 16], turned[16 * 16];
  for (int64_t r = 0; r < rows; r += 16) {
    const float* from = block + r;
    for (int64_t c = 0; c < 16; c++, from += 2 * width)
      _mm512_store_si512(pairs + c * 16, bf16_pairs(load(from), load(from + width)));
    transpose_square(pairs, 16, turned, 16);  // two channels move as one fp32 number
    const int64_t wide = rows - r < 16 ? rows - r : 16;
    for (int64_t j = 0; j < wide; j++) memcpy(to + (r + j) * to_row, turned + j * 16, channels * 2);
  }
}
#endif

// One matrix an expert [height, depth], as P's products read them; copied only if they must be.
template <class P, class W>
class Matrices {
  using E = typename P::Element;

 public:
  Matrices(const Problem& p, const W* w, int64_t rows, int64_t columns, bool turned)
      : slot_(p.experts, -1), copies_(0) {
    size_ = rows * columns;
    if constexpr (std::is_same_v<W, E>) {
      if (!turned && P::padded(rows) == rows && P::padded(columns) == columns) {
        lent_ = w;
        row_ = columns;
        return;
      }
    }
    const int64_t height = P::padded(turned ? columns : rows);
    const int64_t depth = P::padded(turned ? rows : columns);
    std::vector<int64_t> used;
    for (int64_t e = 0; e < p.experts; e++)
      if (p.counts[e]) slot_[e] = int64_t(used.size()), used.push_back(e);
    row_ = depth, step_ = height * depth;
    copies_ = Buffer<E>(int64_t(used.size()) * step_);
    constexpr int64_t STRIP = 32;  // lines of a copy
    const int64_t strips = (height + STRIP - 1) / STRIP, tasks = int64_t(used.size()) * strips;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
      const W* from = w + used[task / strips] * size_;
      E* to = copies_ + task / strips * step_;
      const int64_t begin = task % strips * STRIP;
      const int64_t end = begin + STRIP < height ? begin + STRIP : height;
      if (turned) turn(from, rows, columns, begin, end, depth, to);
      else
        for (int64_t m = begin; m < end; m++) {
          int64_t n = m < rows ? columns : 0;
          convert(from + m * columns, n, to + m * depth);
          memset(to + m * depth + n, 0, (depth - n) * sizeof(E));
        }
    }
  }

  typename P::Matrix of(int64_t expert) const {
    const E* start = lent_ ? lent_ + expert * size_ : copies_ + slot_[expert] * step_;
    return {start, row_};
  }

 private:
  // Lines begin .. end of the copy are columns of `from`.
  static void turn(const W* from, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                   int64_t depth, E* to) {
    alignas(64) float square[LANES * LANES], turned[LANES * LANES];
    for (int64_t c = begin; c < end; c += LANES)
      for (int64_t r = 0; r < depth; r += LANES) {
        const int64_t wide = columns - c < LANES ? columns - c : LANES;
        const int64_t high = end - c < LANES ? end - c : LANES;
        const int64_t deep = depth - r < LANES ? depth - r : LANES;
        for (int64_t i = 0; i < LANES; i++) {
          const int64_t n = r + i < rows && wide > 0 ? wide : 0;
          convert(from + (r + i) * columns + c, n, square + i * LANES);
          for (int64_t j = n; j < LANES; j++) square[i * LANES + j] = 0.f;
        }
        transpose_square(square, LANES, turned, LANES);
        for (int64_t j = 0; j < high; j++)
          convert(turned + j * LANES, deep, to + (c + j) * depth + r);
      }
  }

  const E* lent_ = nullptr;
  std::vector<int64_t> slot_;
  Buffer<E> copies_;
  int64_t size_ = 0, step_ = 0;
  ptrdiff_t row_ = 0;
};

// ── between the products ─────────────────────────────────────────────────────────────────────────

// gate <- silu(gate) * up; both have room up to a multiple of LANES.
void swiglu(int64_t n, float* gate, const float* up) {
  for (int64_t i = 0; i < n; i += LANES) {
    vec x = load(gate + i);
    store(gate + i, x / (splat(1.f) + exp_lanes(-x)) * load(up + i));
  }
}

// One block [channels, width] of the hidden vectors on the way back.
//
// d_h is the gradient of what leaves the activation before the chosen expert's weight; a row's
// share of that weight's gradient is the sum of h d_h. `d_h` becomes d_up.
template <class E>
void swiglu_backward(int64_t channels, int64_t width, const E* gates, const E* ups,
                     const float* weights, float* d_h, float* h, float* d_gate, float* share) {
  for (int64_t c = 0; c < channels; c++) {
    const E *gate = gates + c * width, *up = ups + c * width;
    float *d = d_h + c * width, *out = h + c * width, *d_g = d_gate + c * width;
    const vec one = splat(1.f);
    for (int64_t r = 0; r < width; r += LANES) {
      vec g = load_wide(gate + r), u = load_wide(up + r), d_row = load(d + r);
      vec open = one / (one + exp_lanes(-g)), silu = g * open, weight = load(weights + r);
      store(share + r, load(share + r) + silu * u * d_row);
      store(out + r, silu * u * weight);
      d_row *= weight;
      store(d_g + r, d_row * u * (open + silu * (one - open)));
      store(d + r, d_row * silu);
    }
  }
}

constexpr float SQRT_HALF = 0.70710678f, INVERSE_SQRT_TAU = 0.39894228f;

void gelu(int64_t n, float* x) {
  for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1.f + std::erf(x[i] * SQRT_HALF));
}

template <class E>
void gelu_backward(int64_t channels, int64_t width, const E* ups, const float* weights, float* d_h,
                   float* h, float* share) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t r = 0; r < width; r++) {
      const int64_t i = c * width + r;
      float x = to_float(ups[i]), portion = 0.5f * (1.f + std::erf(x * SQRT_HALF));
      share[r] += x * portion * d_h[i];
      h[i] = x * portion * weights[r];
      d_h[i] *= weights[r] * (portion + x * INVERSE_SQRT_TAU * exp_fast(-0.5f * x * x));
    }
}

int64_t token_of(const Problem& p, int64_t row) {
  return p.assignments ? p.assignments[row] / p.choices : row;
}

float weight_of(const Problem& p, int64_t row) {
  return p.weights ? p.weights[p.assignments ? p.assignments[row] : row] : 1.f;
}

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

// The answers of a channel that everyone visits once are its output already.
template <class E, class X>
bool writes_directly(const Problem& p) {
  return std::is_same_v<X, E> && !p.rows && !p.weights;
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────

// `gates` and `ups` keep what the backward pass needs, panel by panel [padded(hidden), width].
template <class P, class X, class W>
void forward(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down, X* y,
             void* kept_gates, void* kept_ups) {
  using E = typename P::Element;
  const std::vector<Panel> panels = panels_of(p, P::ROUND);
  const Matrices<P, W> ups(p, w_up, p.hidden, p.dim, false);
  const Matrices<P, W> downs(p, w_down, p.dim, p.hidden, false);
  std::unique_ptr<Matrices<P, W>> gates;
  if (w_gate) gates = std::make_unique<Matrices<P, W>>(p, w_gate, p.hidden, p.dim, false);
  const int64_t dim = P::padded(p.dim), hidden = P::padded(p.hidden);
  const bool is_direct = writes_directly<E, X>(p);
  Buffer<E> room(is_direct ? 0 : p.routed * p.dim);
  E* answers = is_direct ? reinterpret_cast<E*>(y) : room;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Tiles tiles(P::IS_TILED);
    Buffer<E> tokens(dim * PANEL), between(hidden * PANEL);
    Buffer<float> gate(P::block * PANEL), up(P::block * PANEL);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < panels.size(); n++) {
      const Panel& panel = panels[n];
      const int64_t width = panel.width, at = panel.offset * hidden;
      read_panel<P>(x, p.dim, panel, [&](int64_t row) { return token_of(p, row); }, tokens);
      for (int64_t f = 0; f < hidden; f += P::block) {
        const int64_t size = hidden - f < P::block ? hidden - f : P::block;
        P::multiply(size, dim, ups.of(panel.expert).from(f), tokens, width, up);
        if (kept_ups)
          convert(static_cast<float*>(up), size * width,
                  static_cast<E*>(kept_ups) + at + f * width);
        if (w_gate) {
          P::multiply(size, dim, gates->of(panel.expert).from(f), tokens, width, gate);
          if (kept_gates)
            convert(static_cast<float*>(gate), size * width,
                    static_cast<E*>(kept_gates) + at + f * width);
          swiglu(size * width, gate, up);
        } else {
          gelu(size * width, up);
        }
        P::to_panel(w_gate ? gate : up, size, width, between + f * width);
      }
      for (int64_t d = 0; d < p.dim; d += P::block) {
        const int64_t size = dim - d < P::block ? dim - d : P::block;
        const int64_t real = p.dim - d < P::block ? p.dim - d : P::block;
        P::multiply(size, hidden, downs.of(panel.expert).from(d), between, width, up);
        write_rows(up, real, width, panel.rows, answers + panel.first * p.dim + d, p.dim);
      }
    }
  }
  if (!is_direct) combine(p, answers, true, y);
}

// ── forward for a few rows an expert, as when decoding: each weight is read once ─────────────────

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
  const std::vector<Panel> panels = panels_of(p, 1);
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
        float* hiddens = w_gate ? gate + r * LINES : up + r * LINES;
        if (w_gate) swiglu(size, hiddens, up + r * LINES);
        else gelu(size, hiddens);
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

// ── backward ─────────────────────────────────────────────────────────────────────────────────────

struct Gradients {
  const void *y, *gates, *ups;  // given; the last two as forward kept them
  void *x, *w_gate, *w_up, *w_down;
  float* weights;  // [tokens * choices], zero where dropped; null if not wanted
};

// One task's share of a weight's gradient: strips of [channels, COLUMNS] of one expert, each its
// sum over rows of left [channels, row] right [row, column].
template <class P, class X>
class Reduction {
  using E = typename P::Element;
  static constexpr int64_t STRIP = ROWS_AT_ONCE * COLUMNS;

 public:
  Reduction() : right_(STRIPS * STRIP) {}

  // Gather strips of columns of the rows of some panels of one expert: a row's lie together, so
  // one wait for a far row serves them all.
  template <class Token>
  void gather(const X* x, int64_t dim, int64_t column, int64_t strips, const Panel* panels,
              int64_t count, Token token) {
    constexpr int64_t AHEAD = 8;
    const int64_t end = column + strips * COLUMNS < dim ? column + strips * COLUMNS : dim;
    E* to = right_;
    for (const Panel* panel = panels; panel < panels + count; panel++)
      for (int64_t r = 0; r < panel->width; r += 2, to += 2 * COLUMNS) {
        const X* rows[2] = {};
        for (int64_t i = 0; i < 2 && r + i < panel->rows; i++) {
          rows[i] = x + token(panel->first + r + i) * dim;
          if (r + i + AHEAD < panel->rows)
            prefetch(x + token(panel->first + r + i + AHEAD) * dim + column,
                     (end - column) * sizeof(X));
        }
        alignas(64) E room[2 * COLUMNS];
        for (int64_t c = column, s = 0; c < end; c += COLUMNS, s++) {
          const int64_t size = end - c < COLUMNS ? end - c : COLUMNS;
          P::pair_rows(line(rows[0], c, size, room), line(rows[1], c, size, room + COLUMNS),
                       to + s * STRIP);
        }
      }
  }

  // sum [channels, COLUMNS] = (or +=) left right, for channels from `first` on of all `height`.
  void multiply(int64_t channels, int64_t first, int64_t height, const E* left, int64_t strip,
                const Panel* panels, int64_t count, bool adds, float* sum) const {
    std::vector<Term<E>> terms;
    const E* right = right_ + strip * STRIP;
    for (const Panel* panel = panels; panel < panels + count; panel++) {
      const E* rows = left + panel->offset * height + first * panel->width;
      terms.push_back({rows, right, panel->rows, panel->width});
      right += panel->width * COLUMNS;
    }
    P::reduce(channels, terms, sum, adds);
  }

 private:
  // COLUMNS of a row, as they lie or copied to `room` and filled up; zeros for no row.
  static const E* line(const X* row, int64_t column, int64_t size, E* room) {
    if constexpr (std::is_same_v<X, E>)
      if (row && size == COLUMNS) return row + column;
    if (!row) size = 0;
    if (size) convert(row + column, size, room);
    memset(room + size, 0, (COLUMNS - size) * sizeof(E));
    return room;
  }

  Buffer<E> right_;
};

template <class P, class X, class W>
void backward(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
              const Gradients& d) {
  using E = typename P::Element;
  const std::vector<Panel> panels = panels_of(p, P::ROUND);
  const int64_t dim = P::padded(p.dim), hidden = P::padded(p.hidden);
  const int64_t places = panels.empty() ? 0 : panels.back().offset + panels.back().width;
  const X* d_y = static_cast<const X*>(d.y);
  const auto token = [&](int64_t row) { return token_of(p, row); };
  // As left operands over rows: [hidden, width] of each panel.
  Buffer<E> d_gates(w_gate ? places * hidden : 0), d_ups(places * hidden), hiddens(places * hidden);
  const bool is_direct = writes_directly<E, X>(p);
  Buffer<E> room(is_direct || !d.x ? 0 : p.routed * p.dim);
  E* d_rows = is_direct ? static_cast<E*>(d.x) : room;
  {
    const Matrices<P, W> ups(p, w_up, p.hidden, p.dim, true);
    const Matrices<P, W> downs(p, w_down, p.dim, p.hidden, true);
    std::unique_ptr<Matrices<P, W>> gates;
    if (w_gate) gates = std::make_unique<Matrices<P, W>>(p, w_gate, p.hidden, p.dim, true);
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
      const Tiles tiles(P::IS_TILED);
      Buffer<E> answers(dim * PANEL), panel_of_d_gates(P::IS_TILED ? hidden * PANEL : 0);
      Buffer<E> panel_of_d_ups(P::IS_TILED ? hidden * PANEL : 0);
      E *d_gate_panel = panel_of_d_gates, *d_up_panel = panel_of_d_ups;
      const int64_t block = P::block * PANEL;
      Buffer<float> blocks(4 * block);
      float *up = blocks, *h = up + block, *d_gate = h + block, *d_up = d_gate + block;
      alignas(64) float weights[PANEL], share[PANEL];
#pragma omp for schedule(dynamic)
      for (size_t n = 0; n < panels.size(); n++) {
        const Panel& panel = panels[n];
        const int64_t width = panel.width, at = panel.offset * hidden;
        read_panel<P>(d_y, p.dim, panel, token, answers);
        for (int64_t r = 0; r < width; r++) {
          weights[r] = r < panel.rows ? weight_of(p, panel.first + r) : 0.f;
          share[r] = 0.f;
        }
        for (int64_t f = 0; f < hidden; f += P::block) {
          const int64_t channels = hidden - f < P::block ? hidden - f : P::block;
          const int64_t size = channels * width, here = at + f * width;
          // fp32 is made where it stays; bf16 is made in fp32 first.
          if constexpr (!P::IS_TILED)
            d_up = d_ups + here, d_gate = d_gates + here, h = hiddens + here;
          P::multiply(channels, dim, downs.of(panel.expert).from(f), answers, width, d_up);
          const E* kept = static_cast<const E*>(d.ups) + here;
          if (w_gate)
            swiglu_backward(channels, width, static_cast<const E*>(d.gates) + here, kept, weights,
                            d_up, h, d_gate, share);
          else
            gelu_backward(channels, width, kept, weights, d_up, h, share);
          if constexpr (P::IS_TILED) {
            convert(h, size, hiddens + here);
            convert(d_up, size, d_ups + here);
            P::to_panel(d_up, channels, width, d_up_panel + f * width);
            if (!w_gate) continue;
            convert(d_gate, size, d_gates + here);
            P::to_panel(d_gate, channels, width, d_gate_panel + f * width);
          }
        }
        const E* by_ups = P::IS_TILED ? d_up_panel : d_ups + at;
        const E* by_gates = P::IS_TILED ? d_gate_panel : d_gates + at;
        if (d.weights)
          for (int64_t r = 0; r < panel.rows; r++)
            d.weights[p.assignments ? p.assignments[panel.first + r] : panel.first + r] = share[r];
        if (!d.x) continue;
        for (int64_t c = 0; c < p.dim; c += P::block) {
          const int64_t size = dim - c < P::block ? dim - c : P::block;
          const int64_t real = p.dim - c < P::block ? p.dim - c : P::block;
          const auto by_up = ups.of(panel.expert).from(c);
          if (w_gate)
            P::multiply_both(size, hidden, by_up, by_ups, gates->of(panel.expert).from(c), by_gates,
                             width, up);
          else
            P::multiply(size, hidden, by_up, by_ups, width, up);
          write_rows(up, real, width, panel.rows, d_rows + panel.first * p.dim + c, p.dim);
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
  const int64_t heights = (hidden + CHANNELS - 1) / CHANNELS;
  // With few experts the strips are what threads share.
  const int64_t strips = p.experts * heights < 4 * p.threads ? 1 : STRIPS;
  const int64_t widths = (p.dim + strips * COLUMNS - 1) / (strips * COLUMNS);
  const int64_t tasks = p.experts * widths * heights;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Tiles tiles(P::IS_TILED);
    Reduction<P, X> reduction;
    constexpr int64_t SIZE = CHANNELS * COLUMNS;
    Buffer<float> d_gate(strips * SIZE), d_up(strips * SIZE), d_down(strips * SIZE), turned(SIZE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t e = task / (widths * heights);
      const int64_t begin = task / heights % widths * strips * COLUMNS;
      const int64_t left = (p.dim - begin + COLUMNS - 1) / COLUMNS;
      const int64_t mine = left < strips ? left : strips;
      const int64_t first = task % heights * CHANNELS;
      const int64_t channels = hidden - first < CHANNELS ? hidden - first : CHANNELS;
      if (start[e] == start[e + 1])
        for (Buffer<float>* sums : {&d_gate, &d_up, &d_down}) memset(*sums, 0, mine * SIZE * 4);
      constexpr int64_t AT_ONCE = ROWS_AT_ONCE / PANEL;
      for (int64_t i = start[e]; i < start[e + 1]; i += AT_ONCE) {
        const Panel* some = panels.data() + i;
        const int64_t count = start[e + 1] - i < AT_ONCE ? start[e + 1] - i : AT_ONCE;
        const auto sum = [&](const E* rows, float* to) {
          for (int64_t s = 0; s < mine; s++)
            reduction.multiply(channels, first, hidden, rows, s, some, count, i > start[e],
                               to + s * SIZE);
        };
        reduction.gather(x, p.dim, begin, mine, some, count, token);
        if (w_gate) sum(d_gates, d_gate);
        sum(d_ups, d_up);
        reduction.gather(d_y, p.dim, begin, mine, some, count, token);
        sum(hiddens, d_down);
      }
      const int64_t real = p.hidden - first < channels ? p.hidden - first : channels;
      for (int64_t s = 0; s < mine; s++) {
        const int64_t column = begin + s * COLUMNS;
        const int64_t wide = p.dim - column < COLUMNS ? p.dim - column : COLUMNS;
        const int64_t at = (e * p.hidden + first) * p.dim + column;
        const auto give = [&](const float* sum, void* to) {
          for (int64_t c = 0; c < real; c++)
            convert(sum + s * SIZE + c * COLUMNS, wide, static_cast<W*>(to) + at + c * p.dim);
        };
        if (w_gate) give(d_gate, d.w_gate);
        give(d_up, d.w_up);
        write_rows(d_down + s * SIZE, real, COLUMNS, wide, turned, CHANNELS);
        for (int64_t c = 0; c < wide; c++)
          convert(turned + c * CHANNELS, real,
                  static_cast<W*>(d.w_down) + (e * p.dim + column + c) * p.hidden + first);
      }
    }
  }
}

// Call with the types of what is stored: run(X, W).
template <class Run>
void with_types(int x_is_bf16, int w_is_bf16, Run run) {
  if (x_is_bf16) {
    if (w_is_bf16) run(bf16{}, bf16{});
    else run(bf16{}, float{});
  } else {
    if (w_is_bf16) run(float{}, bf16{});
    else run(float{}, float{});
  }
}

template <class Run>
void with_products(int tiled, Run run) {
#if HAS_TILES
  if (tiled && amx_granted()) return run(Tiled{});
#endif
  (void)tiled;
  run(Fp32{});
}

}  // namespace

// Sort assignments by expert; within an expert first choices come first, then by token.
//
// Fills counts [experts] with the rows each expert keeps of at most `capacity`, rows [N * A] with
// each assignment's row (their number where it was dropped), assignments with the inverse.
// Returns the number of rows, or -1 if an id is outside [0, experts).
EXPORT int64_t experts_sort(int64_t tokens, int64_t choices, int64_t experts, int64_t capacity,
                            const int64_t* ids, int64_t* counts, int64_t* rows,
                            int64_t* assignments) {
  memset(counts, 0, experts * sizeof(int64_t));
  for (int64_t i = 0; i < tokens * choices; i++) {
    if (ids[i] < 0 || ids[i] >= experts) return -1;
    counts[ids[i]]++;
  }
  std::vector<int64_t> next(experts), end(experts);
  int64_t total = 0;
  for (int64_t e = 0; e < experts; e++) {
    if (counts[e] > capacity) counts[e] = capacity;
    next[e] = total;
    total += counts[e];
    end[e] = total;
  }
  for (int64_t a = 0; a < choices; a++)
    for (int64_t i = a; i < tokens * choices; i += choices) {
      int64_t& row = next[ids[i]];
      if (row < end[ids[i]]) {
        assignments[row] = i;
        rows[i] = row++;
      } else {
        rows[i] = total;
      }
    }
  return total;
}

// The `choices` largest of each row, largest first; equals by index, a NaN before any number.
EXPORT void experts_choose(int64_t tokens, int64_t experts, int64_t choices,
                           const float* preferences, int64_t* ids, int64_t threads) {
  const auto is_before = [](float x, float y) { return x > y || (x != x && y == y); };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < tokens; n++) {
    const float* row = preferences + n * experts;
    int64_t *best = ids + n * choices, found = 0;
    for (int64_t e = 0; e < experts; e++) {
      if (found == choices && !is_before(row[e], row[best[choices - 1]])) continue;
      int64_t place = found < choices ? found++ : choices - 1;
      for (; place > 0 && is_before(row[e], row[best[place - 1]]); place--)
        best[place] = best[place - 1];
      best[place] = e;
    }
  }
}

// What forward keeps for backward, of each of gate and up: bytes.
EXPORT int64_t experts_kept_bytes(const Problem* p, int tiled) {
  int64_t bytes = 0;
  with_products(tiled, [&](auto kind) {
    using P = decltype(kind);
    const std::vector<Panel> panels = panels_of(*p, P::ROUND);
    if (!panels.empty())
      bytes = (panels.back().offset + panels.back().width) * P::padded(p->hidden) *
              int64_t(sizeof(typename P::Element));
  });
  return bytes;
}

EXPORT int experts_have_tiles() { return amx_granted(); }

// kept_gates and kept_ups may be null; w_gate may be null.
EXPORT void experts_forward(const Problem* p, int tiled, int x_is_bf16, int w_is_bf16,
                            const void* x, const void* w_gate, const void* w_up,
                            const void* w_down, void* y, void* kept_gates, void* kept_ups) {
  with_products(tiled, [&](auto kind) {
    with_types(x_is_bf16, w_is_bf16, [&](auto x_type, auto w_type) {
      using X = decltype(x_type);
      using W = decltype(w_type);
      // Tiles read bf16 weights at the memory's rate whatever the number of rows.
      if (!decltype(kind)::IS_TILED && !kept_ups && has_few_rows(*p))
        forward_few(*p, static_cast<const X*>(x), static_cast<const W*>(w_gate),
                    static_cast<const W*>(w_up), static_cast<const W*>(w_down),
                    static_cast<X*>(y));
      else
        forward<decltype(kind)>(*p, static_cast<const X*>(x), static_cast<const W*>(w_gate),
                              static_cast<const W*>(w_up), static_cast<const W*>(w_down),
                              static_cast<X*>(y), kept_gates, kept_ups);
    });
  });
}

// Gradients have the types of what they are gradients of; those of experts without rows are zero.
EXPORT void experts_backward(const Problem* p, int tiled, int x_is_bf16, int w_is_bf16,
                             const void* x, const void* w_gate, const void* w_up,
                             const void* w_down, const Gradients* d) {
  with_products(tiled, [&](auto kind) {
    with_types(x_is_bf16, w_is_bf16, [&](auto x_type, auto w_type) {
      using X = decltype(x_type);
      using W = decltype(w_type);
      backward<decltype(kind)>(*p, static_cast<const X*>(x), static_cast<const W*>(w_gate),
                               static_cast<const W*>(w_up), static_cast<const W*>(w_down), *d);
    });
  });
}
