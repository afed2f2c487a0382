// Feed-forward experts over the tokens that chose them, forward and backward.
//
//   y[n] = sum_a weight[n, a] w_down[e] (silu(w_gate[e] x[n]) * (w_up[e] x[n]))   e = chosen[n, a]
//
// (w_down gelu(w_up x) without w_gate). A dense channel is one expert that everyone visits.
//
// Products are in fp32 (experts_exact.h, and experts_few.h where each expert has a few rows), or in
// bf16 on AMX's tiles with sums in fp32 (experts_rounded.h). A row's answer does not depend on its
// neighbours, and nothing on the threads.
#include "experts_exact.h"
#include "experts_few.h"
#include "experts_rounded.h"

namespace {

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

bool rounds(int tiled) { return tiled && amx_granted(); }

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

// Bytes that forward keeps for backward.
EXPORT int64_t experts_kept_bytes(const Problem* p, int tiled, int is_gated) {
  if (rounds(tiled)) return kept_by_rounded(*p, is_gated) * sizeof(bf16);
  return places_of(panels_of(*p, PANEL, LANES)) * p->hidden * (is_gated ? 2 : 1) * sizeof(float);
}

EXPORT int experts_have_tiles() { return amx_granted(); }

// kept and w_gate may be null.
EXPORT void experts_forward(const Problem* p, int tiled, int x_is_bf16, int w_is_bf16,
                            const void* x, const void* w_gate, const void* w_up,
                            const void* w_down, void* y, void* kept) {
  with_types(x_is_bf16, w_is_bf16, [&](auto x_type, auto w_type) {
    using X = decltype(x_type);
    using W = decltype(w_type);
    const auto run = [&](auto forward, auto... kept) {
      forward(*p, static_cast<const X*>(x), static_cast<const W*>(w_gate),
              static_cast<const W*>(w_up), static_cast<const W*>(w_down), static_cast<X*>(y),
              kept...);
    };
    // Tiles take any number of rows.
    if (rounds(tiled)) run(forward_rounded<X, W>, static_cast<bf16*>(kept));
    else if (!kept && has_few_rows(*p)) run(forward_few<X, W>);
    else run(forward_exactly<X, W>, static_cast<float*>(kept));
  });
}

// Gradients have the types of what they are gradients of; those of experts without rows are zero.
EXPORT void experts_backward(const Problem* p, int tiled, int x_is_bf16, int w_is_bf16,
                             const void* x, const void* w_gate, const void* w_up,
                             const void* w_down, const Gradients* d) {
  with_types(x_is_bf16, w_is_bf16, [&](auto x_type, auto w_type) {
    using X = decltype(x_type);
    using W = decltype(w_type);
    const auto backward = rounds(tiled) ? backward_rounded<X, W> : backward_exactly<X, W>;
    backward(*p, static_cast<const X*>(x), static_cast<const W*>(w_gate),
             static_cast<const W*>(w_up), static_cast<const W*>(w_down), *d);
  });
}
