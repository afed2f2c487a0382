// Experts whose products run on AMX's tiles: operands rounded to bf16, sums in fp32.
//
// A group is some rows of one expert; they stand left of the products as they are. Weights stand
// right, in slices of 32 columns, each packed just before all rows of a group meet it: so weights
// are read once a group as they lie in memory, whatever their type. What a product gives is rows
// again, 32 x 32 numbers at a time, so nothing on the way has to be turned but what the weights'
// gradients sum over rows.
//
// Hidden channels come in units of 16: w_gate's first, w_up's first, w_gate's next, and so on
// (w_up's alone without w_gate). So a slice holds the gate and the up of the same channels, and
// their gradients stand left of one product.
#pragma once

#include <vector>

#include "experts_problem.h"
#include "slices.h"

#if HAS_TILES

namespace {

constexpr int64_t MOST_ROWS = 512;         // of a group
constexpr int64_t MOST_NUMBERS = 1 << 18;  // of its tokens: they stay in the second-level cache
constexpr int64_t WIDTH = 320;             // columns of a weight's gradient, made by one task
constexpr int64_t TILES = 16;              // its units of hidden channels

struct Group {
  int64_t expert, first, rows;
  int64_t before;  // rows of this expert
  int64_t offset;  // rows of all groups before, each filled up and apart
};

// What both ways share: sizes, and the groups with at most `most` rows.
class RoundedWork {
 public:
  RoundedWork(const Problem& p, bool is_gated, int64_t most)
      : p(p),
        slices((p.hidden + (is_gated ? UNIT : SLICE) - 1) / (is_gated ? UNIT : SLICE)),
        span(slices * SLICE),
        token_row(odd_row(p.dim)),
        hidden_row(odd_row(p.hidden)),
        span_row(odd_row(span)) {
    int64_t first = 0, offset = 0;
    for (int64_t e = 0; e < p.experts; e++)
      for (int64_t before = 0; before < p.counts[e];) {
        const int64_t left = p.counts[e] - before, rows = left < most ? left : most;
        groups.push_back({e, first, rows, before, offset});
        first += rows, before += rows, offset += odd_row(rows);
      }
    places = offset;
  }

  static int64_t most_rows(const Problem& p) {
    const int64_t rows = MOST_NUMBERS / p.dim / 64 * 64;
    return rows < 128 ? 128 : rows > MOST_ROWS ? MOST_ROWS : rows;
  }

  // Numbers of a slice: the longest sum's.
  int64_t slice_size() const { return SLICE * up_to(p.dim > span ? p.dim : span, 32); }

  // What a slice gave for one row, as forward keeps it: a slice's lie together.
  template <class T>
  T* kept(T* all, const Group& g, int64_t slice, int64_t row) const {
    return all + (g.first - g.before) * span + slice * p.counts[g.expert] * SLICE +
           (g.before + row) * SLICE;
  }

  const Problem& p;
  const int64_t slices, span, token_row, hidden_row, span_row;
  std::vector<Group> groups;
  int64_t places;
};

// A group's rows [begin, end) of x, filled up with zeros.
template <class X>
void gather(const RoundedWork& work, const X* x, const Group& g, int64_t begin, int64_t end,
            bf16* to) {
  constexpr int64_t AHEAD = 8;
  const Problem& p = work.p;
  for (int64_t r = begin; r < end; r++) {
    if (r + AHEAD < g.rows)
      prefetch(x + token_of(p, g.first + r + AHEAD) * p.dim, p.dim * sizeof(X));
    const X* from = x + token_of(p, g.first + r) * p.dim;
    for (int64_t c = 0; c < p.dim; c += 32)
      _mm512_storeu_si512(to + r * work.token_row + c, line(from + c, p.dim - c));
  }
}

// Columns [begin, end) of a group's answers from where products left them. Stores to far memory
// between products would hold them up.
void give_rows(const RoundedWork& work, const Group& g, const bf16* from, int64_t begin,
               int64_t end, bf16* to) {
  for (int64_t r = 0; r < g.rows; r++)
    for (int64_t c = begin; c < end; c += 32) {
      bf16* there = to + (g.first + r) * work.p.dim + c;
      const __m512i answers = _mm512_loadu_si512(from + r * work.token_row + c);
      if (c + 32 <= end && is_line(there))
        _mm512_stream_si512(reinterpret_cast<__m512i*>(there), answers);
      else
        _mm512_mask_storeu_epi16(there, first(end - c), answers);
    }
  finish_stores_past_caches();
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────

template <class X, class W>
class RoundedForward {
 public:
  RoundedForward(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                 bf16* kept)
      : work_(p, w_gate, RoundedWork::most_rows(p)),
        p_(p), x_(x), w_gate_(w_gate), w_up_(w_up), w_down_(w_down), kept_(kept) {}

  void run(X* y) {
    const bool is_direct = writes_directly<bf16, X>(p_);
    Buffer<bf16> room(is_direct ? 0 : p_.routed * p_.dim);
    answers_ = is_direct ? reinterpret_cast<bf16*>(y) : room;
    const int64_t groups = int64_t(work_.groups.size()), tasks = 4 * p_.threads;
    if (groups < tasks) run_in_parts(groups ? (tasks + groups - 1) / groups : 1);
    else run_whole();
    if (!is_direct) combine(p_, static_cast<bf16*>(room), true, y);
  }

 private:
  // Each group from its tokens to its answers.
  void run_whole() {
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1)
    {
      const Tiles tiles(true);
      Buffer<bf16> tokens(MOST_ROWS * work_.token_row), between(MOST_ROWS * work_.hidden_row);
      Buffer<bf16> slice(work_.slice_size());
#pragma omp for schedule(dynamic)
      for (const Group& g : work_.groups) {
        gather(work_, x_, g, 0, g.rows, tokens);
        hide(g, tokens, 0, work_.slices, slice, between);
        answer(g, between, 0, p_.dim, slice, tokens);
      }
    }
  }

  // Few groups: their slices are what threads share.
  void run_in_parts(int64_t parts) {
    const int64_t groups = int64_t(work_.groups.size());
    const int64_t slices = (work_.slices + parts - 1) / parts;
    const int64_t columns = up_to((p_.dim + parts - 1) / parts, SLICE);
    Buffer<bf16> tokens(work_.places * work_.token_row);
    Buffer<bf16> between(work_.places * work_.hidden_row);
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1)
    {
      const Tiles tiles(true);
      Buffer<bf16> slice(work_.slice_size());
      constexpr int64_t AT_ONCE = 64;
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t n = 0; n < groups; n++)
        for (int64_t r = 0; r < MOST_ROWS; r += AT_ONCE) {
          const Group& g = work_.groups[n];
          const int64_t end = r + AT_ONCE < g.rows ? r + AT_ONCE : g.rows;
          gather(work_, x_, g, r, end, tokens + g.offset * work_.token_row);
        }
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t n = 0; n < groups; n++)
        for (int64_t begin = 0; begin < work_.slices; begin += slices) {
          const Group& g = work_.groups[n];
          const int64_t end = begin + slices < work_.slices ? begin + slices : work_.slices;
          hide(g, tokens + g.offset * work_.token_row, begin, end, slice,
               between + g.offset * work_.hidden_row);
        }
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t n = 0; n < groups; n++)
        for (int64_t begin = 0; begin < p_.dim; begin += columns) {
          const Group& g = work_.groups[n];
          const int64_t end = begin + columns < p_.dim ? begin + columns : p_.dim;
          answer(g, between + g.offset * work_.hidden_row, begin, end, slice,
                 tokens + g.offset * work_.token_row);
        }
    }
  }

  // Hidden vectors [rows, hidden_row] of the channels of some slices.
  void hide(const Group& g, const bf16* tokens, int64_t begin, int64_t end, bf16* slice,
            bf16* between) const {
    const int64_t dim = p_.dim, hidden = p_.hidden, row = work_.hidden_row;
    for (int64_t s = begin; s < end; s++) {
      const auto pack = [&](const W* w, int64_t channel, bf16* to) {
        pack_lines(w + (g.expert * hidden + channel) * dim, dim, hidden - channel, dim, to);
      };
      if (w_gate_) pack(w_gate_, s * UNIT, slice), pack(w_up_, s * UNIT, slice + 512);
      else pack(w_up_, s * SLICE, slice), pack(w_up_, s * SLICE + UNIT, slice + 512);
      times_slice(g.rows, tokens, work_.token_row, slice, dim, SLICE, [&](int64_t r, float* block) {
        if (kept_)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(work_.kept(kept_, g, s, r)), line(block));
        if (w_gate_) {
          const Swiglu at(load(block), load(block + UNIT));
          store_narrow(between + r * row + s * UNIT, at.value());
        } else {
          gelu(SLICE, block);
          _mm512_storeu_si512(between + r * row + s * SLICE, line(block));
        }
      });
    }
    // Terms come in steps of 32: there may be a unit without channels.
    if (w_gate_ && end == work_.slices && end % 2)
      for (int64_t r = 0; r < g.rows; r++) store_narrow(between + r * row + end * UNIT, vec{});
    finish_stores_past_caches();
  }

  // Columns [begin, end) of the group's answers, which come to where its tokens were.
  void answer(const Group& g, const bf16* between, int64_t begin, int64_t end, bf16* slice,
              bf16* rows) const {
    const int64_t dim = p_.dim, hidden = p_.hidden;
    for (int64_t d = begin; d < end; d += SLICE) {
      const W* w = w_down_ + (g.expert * dim + d) * hidden;
      pack_lines(w, hidden, dim - d, hidden, slice);
      pack_lines(w + UNIT * hidden, hidden, dim - d - UNIT, hidden, slice + 512);
      times_slice(g.rows, between, work_.hidden_row, slice, hidden, dim - d,
                  [&](int64_t r, const float* block) {
                    _mm512_storeu_si512(rows + r * work_.token_row + d, line(block));
                  });
    }
    give_rows(work_, g, rows, begin, end, answers_);
  }

  const RoundedWork work_;
  const Problem& p_;
  const X* x_;
  const W *w_gate_, *w_up_, *w_down_;
  bf16* kept_;
  bf16* answers_ = nullptr;
};

// ── backward ─────────────────────────────────────────────────────────────────────────────────────

template <class X, class W>
class RoundedBackward {
 public:
  RoundedBackward(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                  const Gradients& d)
      : work_(p, w_gate, most_rows(p)),
        p_(p), x_(x), w_gate_(w_gate), w_up_(w_up), w_down_(w_down), d_(d),
        d_y_(static_cast<const X*>(d.y)), kept_(static_cast<const bf16*>(d.kept)),
        turned_(d.w_up ? work_.places * work_.span : 0),
        turned_hiddens_(d.w_up ? work_.places * up_to(p.hidden, UNIT) : 0),
        groups_of_(p.experts + 1, 0) {
    for (const Group& g : work_.groups) groups_of_[g.expert + 1]++, used_ += !g.before;
    for (int64_t e = 0; e < p.experts; e++) groups_of_[e + 1] += groups_of_[e];
  }

  void run() {
    const bool is_direct = writes_directly<bf16, X>(p_);
    Buffer<bf16> room(is_direct || !d_.x ? 0 : p_.routed * p_.dim);
    d_rows_ = is_direct ? static_cast<bf16*>(d_.x) : room;
    if (used_ < 4 * p_.threads) run_in_parts();
    else run_whole();
    if (d_.x && !is_direct)
      combine(p_, static_cast<bf16*>(room), false, static_cast<X*>(d_.x));
  }

 private:
  // A sum over rows takes 32 at a step: groups are multiples of that, so how many there are changes
  // no result.
  static int64_t most_rows(const Problem& p) {
    int64_t most = RoundedWork::most_rows(p);
    while (most > 64 && p.routed < 4 * p.threads * most) most = up_to(most / 2, 32);
    return most;
  }

  struct Room {  // of one thread
    explicit Room(const RoundedWork& w)
        : d_y(MOST_ROWS * w.token_row), d_units(MOST_ROWS * w.span_row),
          hiddens(MOST_ROWS * w.hidden_row), slice(w.slice_size()), shares(MOST_ROWS * LANES),
          right(MOST_ROWS * WIDTH), sums(2 * TILES * UNIT * SUM_ROW) {}
    Buffer<bf16> d_y, d_units, hiddens, slice;
    Buffer<float> shares;
    Buffer<bf16> right;
    Buffer<float> sums;
  };
  static constexpr int64_t SUM_ROW = WIDTH + UNIT;

  // Each expert from its tokens to its weights' gradients, while they are in the cache.
  void run_whole() {
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1)
    {
      const Tiles tiles(true);
      Room room(work_);
#pragma omp for schedule(dynamic)
      for (int64_t e = 0; e < p_.experts; e++) {
        for (int64_t n = groups_of_[e]; n < groups_of_[e + 1]; n++) take(work_.groups[n], room);
        if (!d_.w_up) continue;
        for (int64_t tile = 0; tile < tiles_(); tile += TILES)
          for (int64_t begin = 0; begin < p_.dim; begin += WIDTH)
            sum_weights(e, begin, WIDTH, tile, room);
      }
    }
  }

  // Few experts: groups, then parts of the weights are what threads share.
  void run_in_parts() {
    const int64_t groups = int64_t(work_.groups.size());
    const int64_t heights = (tiles_() + TILES - 1) / TILES;
    int64_t columns = WIDTH;
    while (columns > 64 && p_.experts * heights * (p_.dim / columns) < 4 * p_.threads)
      columns -= 64;
    const int64_t widths = (p_.dim + columns - 1) / columns;
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1)
    {
      const Tiles tiles(true);
      Room room(work_);
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < groups; n++) take(work_.groups[n], room);
      if (d_.w_up) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p_.experts * heights * widths; task++)
          sum_weights(task / (heights * widths), task % widths * columns, columns,
                      task / widths % heights * TILES, room);
      }
    }
  }

  int64_t tiles_() const { return (p_.hidden + UNIT - 1) / UNIT; }

  // The gradients of a group's rows; their hidden parts are left turned for `sum_weights`.
  void take(const Group& g, Room& room) const {
    const int64_t dim = p_.dim, hidden = p_.hidden;
    const int64_t span_row = work_.span_row, hidden_row = work_.hidden_row;
    gather(work_, d_y_, g, 0, g.rows, room.d_y);
    float weights[MOST_ROWS];
    for (int64_t r = 0; r < g.rows; r++) weights[r] = weight_of(p_, g.first + r);
    memset(room.shares, 0, g.rows * LANES * sizeof(float));
    for (int64_t f = 0; f < hidden; f += SLICE) {
      for (int64_t k = 0; k < up_to(dim, 32); k += UNIT)
        pack_terms(w_down_ + (g.expert * dim + k) * hidden + f, hidden, dim - k, hidden - f,
                   room.slice + k / 32 * 1024 + k % 32 * 16);
      const int64_t units = hidden - f > UNIT ? 2 : 1;
      const auto give = [&](int64_t row, float* d_hidden) {
        bf16 *d_units = room.d_units + row * span_row, *h = room.hiddens + row * hidden_row + f;
        float* share = room.shares + row * LANES;
        if (!w_gate_)
          return gelu_backward_line(work_.kept(kept_, g, f / SLICE, row), d_hidden, weights[row],
                                    d_units + f, h, share);
        for (int64_t u = 0; u < units; u++)
          swiglu_backward_line(work_.kept(kept_, g, f / UNIT + u, row), d_hidden + u * UNIT,
                               weights[row], d_units + 2 * f + u * SLICE, h + u * UNIT, share);
      };
      times_slice(g.rows, room.d_y, work_.token_row, room.slice, dim,
                  w_gate_ ? hidden - f : SLICE, give);
    }
    if (d_.weights)
      for (int64_t r = 0; r < g.rows; r++)
        d_.weights[p_.assignments ? p_.assignments[g.first + r] : g.first + r] =
            sum(load(room.shares + r * LANES));
    if (d_.x) answer(g, room);
    if (d_.w_up) {
      const int64_t row = odd_row(g.rows), channels = tiles_() * UNIT;
      turn_rows(g.rows, work_.span, room.d_units, span_row, turned_ + g.offset * work_.span, row);
      turn_rows(g.rows, channels, room.hiddens, hidden_row, turned_hiddens_ + g.offset * channels,
                row);
    }
  }

  static void swiglu_backward_line(const bf16* kept, const float* d_hidden, float weight,
                                   bf16* d_both, bf16* h, float* share) {
    const Swiglu at(load_wide(kept), load_wide(kept + UNIT));
    vec d = load(d_hidden);
    store(share, load(share) + at.value() * d);
    store_narrow(h, at.value() * splat(weight));
    d *= splat(weight);
    _mm512_storeu_si512(d_both, bf16_both(at.d_gate(d), at.d_up(d)));
  }

  static void gelu_backward_line(const bf16* kept, float* d_hidden, float weight, bf16* d_ups,
                                 bf16* h, float* share) {
    float hiddens[SLICE];
    for (int64_t i = 0; i < SLICE; i++) {
      const Gelu at(to_float(kept[i]));
      share[i % LANES] += at.value * d_hidden[i];
      hiddens[i] = at.value * weight;
      d_hidden[i] *= weight * at.slope;
    }
    _mm512_storeu_si512(d_ups, line(d_hidden));
    _mm512_storeu_si512(h, line(hiddens));
  }

  // The gradient of the group's tokens, one row a copy, by way of where d_y was.
  void answer(const Group& g, Room& room) const {
    const int64_t dim = p_.dim, hidden = p_.hidden;
    for (int64_t c = 0; c < dim; c += SLICE) {
      for (int64_t unit = 0; unit < 2 * work_.slices; unit++) {
        const int64_t f = (w_gate_ ? unit / 2 : unit) * UNIT;
        const W* w = w_gate_ && unit % 2 == 0 ? w_gate_ : w_up_;
        pack_terms(w + (g.expert * hidden + f) * dim + c, dim, hidden - f, dim - c,
                   room.slice + unit / 2 * 1024 + unit % 2 * 256);
      }
      times_slice(g.rows, room.d_units, work_.span_row, room.slice, work_.span, dim - c,
                  [&](int64_t r, const float* block) {
                    _mm512_storeu_si512(room.d_y + r * work_.token_row + c, line(block));
                  });
    }
    give_rows(work_, g, room.d_y, 0, dim, d_rows_);
  }

  // Columns [begin, begin + columns) of one expert's gradients, for TILES units from `tile` on.
  void sum_weights(int64_t expert, int64_t begin, int64_t columns, int64_t tile, Room& room) const {
    const int64_t dim = p_.dim, hidden = p_.hidden;
    if (begin + columns > dim) columns = dim - begin;
    const int64_t here = tiles_() - tile < TILES ? tiles_() - tile : TILES;
    const int64_t both = w_gate_ ? 2 : 1, wide = up_to(columns, SLICE);
    const auto sum = [&](const X* x, const bf16* turned, int64_t channels, int64_t from,
                         int64_t count) {
      float* sums = room.sums;
      if (groups_of_[expert] == groups_of_[expert + 1]) memset(sums, 0, count * SUM_ROW * 4);
      for (int64_t n = groups_of_[expert]; n < groups_of_[expert + 1]; n++) {
        const Group& g = work_.groups[n];
        const auto token = [&](int64_t r) { return x + token_of(p_, g.first + r) * dim + begin; };
        pair_rows(g.rows, columns, wide, token, room.right);
        auto run = g.before ? gemm_packed<true> : gemm_packed<false>;
        const int64_t row = odd_row(g.rows);
        run(int(count), int(wide), int(up_to(g.rows, 32)),
            turned + g.offset * channels + from * row, int(row), room.right, int(wide), sums,
            SUM_ROW);
      }
    };
    sum(x_, turned_, work_.span, tile * both * UNIT, here * both * UNIT);
    for (int64_t u = 0; u < here * both; u++) {
      const int64_t f = (tile + u / both) * UNIT;
      W* to = static_cast<W*>(both == 2 && u % 2 == 0 ? d_.w_gate : d_.w_up);
      for (int64_t i = 0; i < UNIT && f + i < hidden; i++)
        copy_past_caches(room.sums + (u * UNIT + i) * SUM_ROW, columns,
                         to + (expert * hidden + f + i) * dim + begin);
    }
    sum(d_y_, turned_hiddens_, tiles_() * UNIT, tile * UNIT, here * UNIT);
    alignas(64) float square[UNIT * UNIT];
    for (int64_t c = 0; c < columns; c += UNIT)
      for (int64_t u = 0; u < here; u++) {
        const int64_t f = (tile + u) * UNIT;
        transpose_square(room.sums + u * UNIT * SUM_ROW + c, SUM_ROW, square, UNIT);
        const int64_t real = hidden - f < UNIT ? hidden - f : UNIT;
        W* to = static_cast<W*>(d_.w_down) + (expert * dim + begin + c) * hidden + f;
        for (int64_t i = 0; i < UNIT && c + i < columns; i++)
          copy_past_caches(square + i * UNIT, real, to + i * hidden);
      }
    finish_stores_past_caches();
  }

  const RoundedWork work_;
  const Problem& p_;
  const X* x_;
  const W *w_gate_, *w_up_, *w_down_;
  const Gradients& d_;
  const X* d_y_;
  const bf16* kept_;
  bf16* d_rows_ = nullptr;
  Buffer<bf16> turned_, turned_hiddens_;
  std::vector<int64_t> groups_of_;  // where each expert's begin
  int64_t used_ = 0;                // experts with rows
};

// Numbers that forward keeps for backward.
int64_t kept_by_rounded(const Problem& p, bool is_gated) {
  return p.routed * RoundedWork(p, is_gated, MOST_ROWS).span;
}

template <class X, class W>
void forward_rounded(const Problem& p, const X* x, const W* w_gate, const W* w_up, const W* w_down,
                     X* y, bf16* kept) {
  RoundedForward<X, W>(p, x, w_gate, w_up, w_down, kept).run(y);
}

template <class X, class W>
void backward_rounded(const Problem& p, const X* x, const W* w_gate, const W* w_up,
                      const W* w_down, const Gradients& d) {
  RoundedBackward<X, W>(p, x, w_gate, w_up, w_down, d).run();
}

}  // namespace
#else
namespace {

int64_t kept_by_rounded(const Problem&, bool) { return 0; }
template <class X, class W>
void forward_rounded(const Problem&, const X*, const W*, const W*, const W*, X*, bf16*) {}
template <class X, class W>
void backward_rounded(const Problem&, const X*, const W*, const W*, const W*, const Gradients&) {}

}  // namespace
#endif
