// Kimi Delta Attention over chunks in fp32: forward, and the backward pass written by hand.
//
// A chunk is cut in blocks of 16 tokens. Between two blocks "survival by halves" splits the decay
// at a cut, so a block of pairs is one matrix product; inside a block what each token wrote is
// carried along and fades step by step. Nothing is ever divided by a decay, so any decay in [0, 1]
// is exact.
#pragma once

#include "kda_chunk.h"

namespace {

// to = sign * x * y, row by row; `by` scales each row if given. All [rows, width].
void multiply(int rows, int width, const float* x, const float* y, float* to,
              const float* by = nullptr, float sign = 1.f) {
  for (int i = 0; i < rows; i++) {
    vec scale = splat(by ? sign * by[i] : sign);
    for (int j = 0; j < width; j += LANES)
      store(to + i * width + j, load(x + i * width + j) * load(y + i * width + j) * scale);
  }
}

struct ExactChunk : Chunk {
  float *prefix, *suffix;  // of the level at hand; at the end, of the whole chunk
  float *right, *left, *turned, *fading;
  float* scaled;
  float* memories;  // of the task's heads, or their gradients

  ExactChunk(Scratch& s, int C, int K, int V, int64_t heads) : Chunk(s, C, K, V) {
    prefix = s.take(C * K), suffix = s.take(C * K);
    right = s.take(C * K), left = s.take(C * K), turned = s.take(C * K);
    fading = s.take(2 * BLOCK * K);
    scaled = s.take(2 * C * K);
    memories = s.take(heads * K * V);
  }

  // Products within `size` tokens from `first` on: from the stretch's start through each token, and
  // from behind it to the stretch's end.
  void products_within(int size, int first) {
    float *p = prefix + first * K, *s = suffix + first * K, *d = decay + first * K;
    memcpy(p, d, sizeof(float) * K);
    for (int i = 1; i < size; i++)
      for (int j = 0; j < K; j++) p[i * K + j] = p[(i - 1) * K + j] * d[i * K + j];
    for (int j = 0; j < K; j++) s[(size - 1) * K + j] = 1.f;
    for (int i = size - 2; i >= 0; i--)
      for (int j = 0; j < K; j++) s[i * K + j] = s[(i + 1) * K + j] * d[(i + 1) * K + j];
  }

  // From products within `half` tokens to products within twice as many.
  void double_products(int half) {
    for (int first = 0; first < C; first += 2 * half) {
      float *p_left = prefix + (first + half - 1) * K;
      float *p_right = prefix + (first + half) * K, *s_left = suffix + first * K;
      float* p_end = p_right + (half - 1) * K;
      for (int i = 0; i < half; i++)
        for (int j = 0; j < K; j++) s_left[i * K + j] *= p_end[j];
      for (int i = 0; i < half; i++)
        for (int j = 0; j < K; j++) p_right[i * K + j] *= p_left[j];
    }
  }

  // right = right halves of q and of beta k, times the prefix; left = left half of k, times the
  // suffix: a row of the one times a row of the other is what the later token reads of the earlier.
  void scale_halves(int first, int half) {
    int at = (first + half) * K, size = half * K;
    multiply(half, K, q + at, prefix + at, right);
    multiply(half, K, k + at, prefix + at, right + size, beta + first + half);
    multiply(half, K, k + first * K, suffix + first * K, left);
  }

  // What row i reads of column j <= i with its query (q_on_k, zero above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1.
  // Leaves the whole chunk's products in prefix and suffix.
  void pairs(float* q_on_k, float* system) {
    memset(q_on_k, 0, sizeof(float) * C * stride);
    for (int first = 0; first < C; first += BLOCK) {
      diagonal_block(first, q_on_k, system);
      products_within(BLOCK, first);
    }
    for (int half = BLOCK; half < C; half *= 2) {
      halves_pairs(half, q_on_k, system);
      double_products(half);
    }
    invert_diagonal(system);
  }

  // The pairs across the cuts of one level.
  void halves_pairs(int half, float* q_on_k, float* system) {
    for (int first = 0; first < C; first += 2 * half) {
      scale_halves(first, half);
      transpose(half, K, left, K, turned, half);
      const ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
      gemm<Into::SET>(half, half, K, {right, K, 1}, turned, half, q_on_k + at, stride);
      gemm<Into::SET>(half, half, K, {right + half * K, K, 1}, turned, half, system + at, stride);
    }
  }

  void diagonal_block(int first, float* q_on_k, float* L) {
    for (int t = 0; t < BLOCK; t++) {
      const float *q_t = q + (first + t) * K, *k_t = k + (first + t) * K;
      const float* decay_t = decay + (first + t) * K;
      const ptrdiff_t at = ptrdiff_t(first + t) * stride + first;
      for (int s = 0; s < t; s++) {
        float* wrote = fading + s * K;
        vec by_q = {}, by_k = {};
        for (int j = 0; j < K; j += LANES) {
          vec left = load(wrote + j) * load(decay_t + j);
          store(wrote + j, left);
          by_q += left * load(q_t + j);
          by_k += left * load(k_t + j);
        }
        q_on_k[at + s] = sum(by_q);
        L[at + s] = sum(by_k) * beta[first + t];
      }
      vec by_q = {};
      for (int j = 0; j < K; j += LANES) {
        store(fading + t * K + j, load(k_t + j));
        by_q += load(k_t + j) * load(q_t + j);
      }
      q_on_k[at + t] = sum(by_q);
    }
  }

  // Gradients of the pairs: to q and beta k as rows, to k as columns, all added to.
  struct Sums {
    float *row_q, *row_k, *column_k;
  };
  void pairs_backward(const float* d_q_on_k, const float* d_L, Sums sums) {
    for (int first = 0; first < C; first += BLOCK) {
      diagonal_backward(first, d_q_on_k, d_L, sums);
      products_within(BLOCK, first);
    }
    for (int half = BLOCK; half < C; half *= 2) {
      halves_backward(half, d_q_on_k, d_L, sums);
      double_products(half);
    }
  }

  void halves_backward(int half, const float* d_q_on_k, const float* d_L, Sums sums) {
    for (int first = 0; first < C; first += 2 * half) {
      const ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
      const int rows = (first + half) * K, columns = first * K;
      scale_halves(first, half);
      gemm<Into::SET>(half, K, half, {d_q_on_k + at, stride, 1}, left, K, turned, K);
      add_scaled(half, turned, prefix + rows, sums.row_q + rows);
      gemm<Into::SET>(half, K, half, {d_L + at, stride, 1}, left, K, turned, K);
      add_scaled(half, turned, prefix + rows, sums.row_k + rows);
      gemm<Into::SET>(half, K, half, {d_q_on_k + at, 1, stride}, right, K, turned, K);
      gemm<Into::ADD>(half, K, half, {d_L + at, 1, stride}, right + half * K, K, turned, K);
      add_scaled(half, turned, suffix + columns, sums.column_k + columns);
    }
  }

  void add_scaled(int rows, const float* x, const float* by, float* to) {
    for (int i = 0; i < rows * K; i += LANES)
      store(to + i, load(to + i) + load(x + i) * load(by + i));
  }

  void diagonal_backward(int first, const float* d_q_on_k, const float* d_L, Sums sums) {
    const auto [row_q, row_k, column_k] = sums;
    float* worth = fading + BLOCK * K;  // what a later reader makes of each earlier write
    memset(worth, 0, sizeof(float) * BLOCK * K);
    for (int t = 0; t < BLOCK; t++) {
      int row = first + t;
      const float *d_reads = d_q_on_k + ptrdiff_t(row) * stride + first;
      const float *d_recalls = d_L + ptrdiff_t(row) * stride + first;
      for (int j = 0; j < K; j += LANES) {
        vec fade = load(decay + row * K + j), key = load(k + row * K + j);
        vec to_q = load(row_q + row * K + j) + key * splat(d_reads[t]);
        vec to_k = load(row_k + row * K + j);
        for (int s = 0; s < t; s++) {
          vec left = load(fading + s * K + j) * fade;
          store(fading + s * K + j, left);
          to_q += left * splat(d_reads[s]);
          to_k += left * splat(d_recalls[s]);
        }
        store(fading + t * K + j, key);
        store(row_q + row * K + j, to_q);
        store(row_k + row * K + j, to_k);
      }
    }
    for (int t = BLOCK - 1; t >= 0; t--) {
      int row = first + t;
      const float *d_reads = d_q_on_k + ptrdiff_t(row) * stride + first;
      const float *d_recalls = d_L + ptrdiff_t(row) * stride + first;
      vec strength = splat(beta[row]);
      for (int j = 0; j < K; j += LANES) {
        vec fade = load(decay + row * K + j), query = load(q + row * K + j);
        vec key = load(k + row * K + j) * strength;
        float* to = column_k + row * K + j;
        store(to, load(to) + load(worth + t * K + j) + query * splat(d_reads[t]));
        for (int s = 0; s < t; s++) {
          float* w = worth + s * K + j;
          store(w, (load(w) + query * splat(d_reads[s]) + key * splat(d_recalls[s])) * fade);
        }
      }
    }
  }
};

struct ExactForward : ExactChunk {
  float *own_delta, *own_q_on_k, *own_system, *out;

  ExactForward(Scratch& s, int C, int K, int V, int64_t heads) : ExactChunk(s, C, K, V, heads) {
    own_q_on_k = s.take(C * C), own_system = s.take(C * C);
    own_delta = s.take(C * V), out = s.take(C * V);
  }
};

void forward_exactly(const Problem& p, int64_t n, Heads heads) {
  auto piece = in_one_piece<ExactForward>(p, heads, BLOCK);
  ExactForward& c = piece.rooms;
  const int K = c.K, V = c.V, stride = c.stride;
  float *memories = c.memories, *out = c.out, *scaled = c.scaled;
  const bool streams = is_long(p);
  const auto put_row = streams ? write_far_row : write_row;
  read_memories(p, p.memory, n, heads, V, K, memories);

  each_stop(p, n, heads, true, [&](const Stop& stop, const Stop& next) {
    float* M = memories + (stop.value_head - heads.first) * K * V;
    const Saved<float, BLOCK> saved(p, stop);
    float* delta = saved.delta ? saved.delta : c.own_delta;
    float* q_on_k = saved.q_on_k ? saved.q_on_k : c.own_q_on_k;
    float* system = saved.system ? saved.system : c.own_system;

    c.begin(stop, BLOCK);
    const int C = c.C;
    c.stage(p, stop, next, 0, C);
    c.stage_written(p, stop, delta);
    c.pairs(q_on_k, system);
    if (saved.start && streams) copy_past_caches(M, int64_t(K) * V, saved.start);
    else if (saved.start) memcpy(saved.start, M, sizeof(float) * K * V);

    multiply(C, K, c.k, c.prefix, scaled, c.beta);
    gemm<Into::SUB>(C, V, K, {scaled, K, 1}, M, V, delta, V);
    c.solve(system, delta);

    multiply(C, K, c.q, c.prefix, scaled);
    gemm<Into::SET>(C, V, K, {scaled, K, 1}, M, V, out, V);
    for (int first = 0; first < C; first += BLOCK)
      gemm<Into::ADD>(BLOCK, V, first + BLOCK, {q_on_k + ptrdiff_t(first) * stride, stride, 1},
                      delta, V, out + first * V, V);
    for (int64_t row = 0; row < stop.tokens; row++)
      put_row(p.out, stop.batch, stop.start + row, stop.value_head, p.value_dim, out + row * V);

    multiply(C, K, c.k, c.suffix, scaled);
    gemm<Into::SCALE_ADD>(K, V, C, {scaled, 1, K}, delta, V, M, V, c.prefix + (C - 1) * K);
  });
  write_memories(p, memories, n, heads, V, K, p.final_memory);
  finish_stores_past_caches();
}

struct ExactBackward : ExactChunk {
  float *d_q_on_k, *d_L;
  float *v, *d_out;  // and below it the residual's gradient
  float *delta_turned, *memory_turned;
  float *d_q, *reads, *writes;  // gradients: of queries; of keys times beta, of keys
  float *d_v, *d_chunk, *d_decay;

  ExactBackward(Scratch& s, int C, int K, int V, int64_t heads) : ExactChunk(s, C, K, V, heads) {
    d_q_on_k = s.take(C * C), d_L = s.take(C * C);
    v = s.take(C * V), d_out = s.take(2 * C * V);
    delta_turned = s.take(C * V), memory_turned = s.take(K * V);
    d_q = s.take(C * K), reads = s.take(C * K), writes = s.take(C * K);
    d_v = s.take(V), d_chunk = s.take(K), d_decay = s.take(K);
  }
};

void backward_exactly(const Problem& p, const Gradients& d, int64_t n, Heads heads) {
  auto piece = in_one_piece<ExactBackward>(p, heads, BLOCK);
  ExactBackward& c = piece.rooms;
  const int K = c.K, V = c.V, stride = c.stride;
  float *memories = c.memories, *scaled = c.scaled, *turned = c.memory_turned;
  float *d_q_on_k = c.d_q_on_k, *d_L = c.d_L, *d_out = c.d_out, *delta_turned = c.delta_turned;
  float *d_q = c.d_q, *reads = c.reads, *writes = c.writes, *d_chunk = c.d_chunk;
  const Outputs outputs(p, d);
  read_memories(p, d.final_memory, n, heads, V, K, memories);

  each_stop(p, n, heads, false, [&](const Stop& stop, const Stop& next) {
    float* dM = memories + (stop.value_head - heads.first) * K * V;
    const Saved<float, BLOCK> saved(p, stop);
    c.begin(stop, BLOCK);
    const int C = c.C;
    c.stage(p, stop, next, 0, C);
    c.products_within(C, 0);
    c.stage_values(p, d.out, stop, d_out);
    ask_for_backward<float, BLOCK>(p, d, next);
    float* residual = d_out + C * V;  // its gradient

    // What each delta is worth, then each residual (beta v - beta k M).
    for (int first = 0; first < C; first += BLOCK)
      gemm<Into::SET>(BLOCK, V, C - first,
                      {saved.q_on_k + ptrdiff_t(first) * stride + first, 1, stride},
                      d_out + first * V, V, residual + first * V, V);
    multiply(C, K, c.k, c.suffix, scaled);
    gemm<Into::ADD>(C, V, K, {scaled, K, 1}, dM, V, residual, V);
    c.solve_transposed(saved.system, residual);

    // Through the pairs' two matrices.
    transpose(C, V, saved.delta, V, delta_turned, C);
    for (int first = 0; first < C; first += BLOCK) {
      const int columns = first + BLOCK;
      const ptrdiff_t at = ptrdiff_t(first) * stride;
      gemm<Into::SET>(BLOCK, columns, V, {d_out + first * V, V, 1}, delta_turned, C, d_q_on_k + at,
                      stride);
      memset(d_L + at, 0, sizeof(float) * BLOCK * stride);
      gemm<Into::SUB>(BLOCK, columns, V, {residual + first * V, V, 1}, delta_turned, C, d_L + at,
                      stride);
    }

    // Through the memory at the chunk's start and the one at its end.
    const float* chunk_decay = c.prefix + (C - 1) * K;
    for (int row = 0; row < K; row++) {
      vec total = {};
      for (int j = 0; j < V; j += LANES)
        total += load(saved.start + row * V + j) * load(dM + row * V + j);
      d_chunk[row] = sum(total) * chunk_decay[row];
    }
    transpose(K, V, saved.start, V, turned, K);
    gemm<Into::SET>(C, K, V, {d_out, V, 1}, turned, K, d_q, K);
    gemm<Into::SET>(C, K, V, {residual, V, 1}, turned, K, reads, K);
    transpose(K, V, dM, V, turned, K);
    gemm<Into::SET>(C, K, V, {saved.delta, V, 1}, turned, K, writes, K);
    multiply(C, K, d_q, c.prefix, d_q);
    multiply(C, K, reads, c.prefix, reads, nullptr, -1.f);
    multiply(C, K, writes, c.suffix, writes);
    for (int row = 0; row < C; row++)
      for (int j = 0; j < K; j += LANES)
        store(d_chunk + j,
              load(d_chunk + j) + load(writes + row * K + j) * load(c.k + row * K + j));

    // Queries read of the memory and residuals were read from it: one product over both.
    multiply(C, K, c.q, c.prefix, scaled);
    multiply(C, K, c.k, c.prefix, scaled + C * K, c.beta, -1.f);
    gemm<Into::SCALE_ADD>(K, V, 2 * C, {scaled, 1, K}, d_out, V, dM, V, chunk_decay);
    c.pairs_backward(d_q_on_k, d_L, {d_q, reads, writes});

    // Every factor is exp(G_i - G_j): G gains where its row reads and loses where it writes, and
    // a token's decay is in every G from its own on.
    c.stage_values(p, p.v, stop, c.v);
    for (int row = C - 1; row >= 0; row--) {
      vec strength = splat(c.beta[row]), through_k = {};
      for (int j = 0; j < K; j += LANES) {
        int e = row * K + j;
        vec read = load(reads + e), key = load(c.k + e), fade = load(c.decay + e);
        through_k += key * read;
        read *= strength;
        vec total = load(d_chunk + j) + load(c.q + e) * load(d_q + e) +
                    key * (read - load(writes + e));
        store(d_chunk + j, total);
        // exp(-inf) has slope 0; do not leave rounding
        store(c.d_decay + j, fade == vec{} ? vec{} : total);
        store(writes + e, read + load(writes + e));
      }
      if (row >= stop.tokens) continue;
      const float through_v = c.value_backward(row, residual, c.v, c.d_v);
      outputs.put_values(stop, row, c.d_v, sum(through_k) + through_v);
      outputs.put_keys(stop, row, 1, 0, K, d_q + row * K, writes + row * K, c.d_decay);
    }
  });
  write_memories(p, memories, n, heads, V, K, d.memory);
  finish_stores_past_caches();
}

}  // namespace
