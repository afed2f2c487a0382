// One chunk of one head of Kimi Delta Attention, as both kernels of kda.cpp have it: its tokens
// brought near, and the triangular system of its pairs solved.
#pragma once

#include <utility>

#include "gemm.h"
#include "kda_problem.h"

namespace {

constexpr int BLOCK = 16;  // tokens that are solved for at once

// A stop's share of what forward leaves for backward: T in rows filled up to whole UNITs.
template <class T, int UNIT>
struct Saved {
  T *start = nullptr, *delta = nullptr, *q_on_k = nullptr;
  float* system = nullptr;

  Saved(const Problem& p, const Stop& stop) {
    if (!p.starts) return;
    const int64_t index = stop.chunk * p.value_heads + stop.value_head;
    const int64_t K = filled_up(p.key_dim, UNIT), V = filled_up(p.value_dim, UNIT), C = p.chunk;
    start = static_cast<T*>(p.starts) + index * K * V;
    delta = static_cast<T*>(p.deltas) + index * C * V;
    q_on_k = static_cast<T*>(p.q_on_k) + index * C * C;
    system = p.system + index * C * C;
  }
};

// What backward reads of a stop beside its tokens: asked for a stop ahead.
template <class T, int UNIT>
void ask_for_backward(const Problem& p, const Gradients& d, const Stop& stop) {
  if (!stop.tokens) return;
  for (int64_t row = 0; row < stop.tokens; row++)
    prefetch_row(d.out, stop.batch, stop.start + row, stop.value_head, p.value_dim);
  const Saved<T, UNIT> saved(p, stop);
  const int64_t K = filled_up(p.key_dim, UNIT), V = filled_up(p.value_dim, UNIT), C = p.chunk;
  prefetch(saved.start, K * V * sizeof(T));
  prefetch(saved.delta, C * V * sizeof(T));
  prefetch(saved.q_on_k, C * C * sizeof(T));
  prefetch(saved.system, C * C * sizeof(float));
}

struct Chunk {
  int C, K, V;  // rows and channels, filled up
  int stride;   // of the C x C matrices
  float *q, *k, *beta, *decay;

  Chunk(Scratch& s, int C_, int K_, int V_) : C(C_), K(K_), V(V_), stride(C_) {
    q = s.take(C * K), k = s.take(C * K), decay = s.take(C * K), beta = s.take(C);
  }

  // The fewest rows that hold a stop's tokens and can be halved down to `smallest`.
  void begin(const Stop& at, int smallest) {
    for (C = smallest; C < at.tokens;) C *= 2;
  }

  // Read a stop's tokens from `first` to `end`, but for their values, and fill up with tokens that
  // change nothing. Ask for those of the stop after it.
  void stage(const Problem& p, const Stop& at, const Stop& next, int first, int end) {
    for (int64_t i = first; i < end; i++) {
      float *q_i = q + i * K, *k_i = k + i * K, *decay_i = decay + i * K;
      if (i >= at.tokens || p.key_dim < K)
        for (float* row : {q_i, k_i, decay_i}) memset(row, 0, sizeof(float) * K);
      if (i < at.tokens) {
        read_row(p.q, at.batch, at.start + i, at.head, p.key_dim, q_i);
        read_row(p.k, at.batch, at.start + i, at.head, p.key_dim, k_i);
        read_row(p.log_decay, at.batch, at.start + i, at.value_head, p.key_dim, decay_i);
        read_row(p.beta, at.batch, at.start + i, at.value_head, 1, beta + i);
      } else {
        beta[i] = 0.f;
      }
      if (i < next.tokens) {
        prefetch_row(p.q, next.batch, next.start + i, next.head, p.key_dim);
        prefetch_row(p.k, next.batch, next.start + i, next.head, p.key_dim);
        prefetch_row(p.v, next.batch, next.start + i, next.value_head, p.value_dim);
        prefetch_row(p.log_decay, next.batch, next.start + i, next.value_head, p.key_dim);
      }
      for (int j = 0; j < K; j += LANES) store(decay_i + j, exp_lanes(load(decay_i + j)));
    }
  }

  // Their rows of a tensor with V channels, filled up with zeros.
  void stage_values(const Problem& p, const Tensor& x, const Stop& at, float* to) const {
    if (at.tokens < C || p.value_dim < V) memset(to, 0, sizeof(float) * C * V);
    for (int64_t i = 0; i < at.tokens; i++)
      read_row(x, at.batch, at.start + i, at.value_head, p.value_dim, to + i * V);
  }

  // The blocks of L on the diagonal become (I + L)^-1.
  void invert_diagonal(float* L) const {
    float one[2 * BLOCK] = {}, inverse[BLOCK][BLOCK];
    one[BLOCK] = 1.f;
    for (int first = 0; first < C; first += BLOCK, L += BLOCK * (stride + 1)) {
      for (int j = 0; j < BLOCK; j += LANES) {
        vec rows[BLOCK];
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) {
          rows[t] = load(one + BLOCK - t + j);
#pragma GCC unroll 16
          for (int s = 0; s < t; s++) rows[t] -= splat(L[t * stride + s]) * rows[s];
          store(inverse[t] + j, rows[t]);
        }
      }
      for (int t = 0; t < BLOCK; t++)
        memcpy(L + ptrdiff_t(t) * stride, inverse[t], sizeof inverse[t]);
    }
  }

  // x = (I + L)^-1 x for x [C, V]
  void solve(const float* system, float* x) {
    float solved[BLOCK * V];
    for (int first = 0; first < C; first += BLOCK) {
      const float* rows = system + ptrdiff_t(first) * stride;
      gemm<Into::SUB>(BLOCK, V, first, {rows, stride, 1}, x, V, x + first * V, V);
      gemm<Into::SET>(BLOCK, V, BLOCK, {rows + first, stride, 1}, x + first * V, V, solved, V);
      memcpy(x + first * V, solved, sizeof(float) * BLOCK * V);
    }
  }

  // x = (I + L)^-T x
  void solve_transposed(const float* system, float* x) {
    float solved[BLOCK * V];
    for (int first = C - BLOCK; first >= 0; first -= BLOCK) {
      int next = first + BLOCK;
      gemm<Into::SUB>(BLOCK, V, C - next, {system + ptrdiff_t(next) * stride + first, 1, stride},
                      x + next * V, V, x + first * V, V);
      gemm<Into::SET>(BLOCK, V, BLOCK, {system + ptrdiff_t(first) * stride + first, 1, stride},
                      x + first * V, V, solved, V);
      memcpy(x + first * V, solved, sizeof(float) * BLOCK * V);
    }
  }

  // beta v
  void stage_written(const Problem& p, const Stop& at, float* to) const {
    stage_values(p, p.v, at, to);
    for (int row = 0; row < C; row++)
      for (int j = row * V; j < (row + 1) * V; j += LANES)
        store(to + j, load(to + j) * splat(beta[row]));
  }

  // Through a row of beta v: to d_v, and returned to beta.
  float value_backward(int64_t row, const float* residual, const float* v, float* d_v) const {
    vec through = {};
    for (int j = 0; j < V; j += LANES) {
      const vec worth = load(residual + row * V + j);
      through += worth * load(v + row * V + j);
      store(d_v + j, worth * splat(beta[row]));
    }
    return sum(through);
  }
};

// What a task needs of this core's cache: Rooms, with channels filled up to whole units.
template <class Rooms>
struct InOnePiece {
  Scratch scratch;
  Rooms rooms;
};
template <class Rooms>
InOnePiece<Rooms> in_one_piece(const Problem& p, Heads heads, int unit) {
  const int C = int(p.chunk), K = int(filled_up(p.key_dim, unit));
  const int V = int(filled_up(p.value_dim, unit));
  const int64_t count = heads.end - heads.first;
  Scratch scratch = Scratch::for_rooms<Rooms>(C, K, V, count);
  Rooms rooms(scratch, C, K, V, count);
  return {std::move(scratch), rooms};
}

}  // namespace
