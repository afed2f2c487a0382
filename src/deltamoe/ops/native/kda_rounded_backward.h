// The backward pass over chunks with rounded products.
#pragma once

#include <algorithm>

#include "kda_rounded.h"

namespace {

#if HAS_TILES
struct RoundedBackward : RoundedChunk {
  float *v, *d_v, *d_out, *residual;  // gradients, but for v
  float *d_q_on_k, *d_L;
  float *d_chunk, *through_k;      // [K]; of each row a vector, to be summed
  bf16 *out_rows, *residual_rows;  // left of a product; these times -1
  bf16* out_and_residual;          // right of it, one below the other
  bf16 *end_rows, *end_turned, *start_turned, *delta_turned, *reads_turned, *asks_turned;
  bf16 *d_readers[LEVELS], *d_wrote[LEVELS];  // left of it: the pairs' gradients, and turned

  // Of a stretch of tokens and channels, before they are joined: what queries and keys get from the
  // chunk's start, at last all gradients of both; what each level's readers get, queries and keys,
  // and what those who wrote get. Of all tokens and these channels: what those who wrote get from
  // the chunk's end, then the decays' gradients.
  float *by_q, *by_k, *by_readers[LEVELS], *by_wrote[LEVELS], *writes;

  RoundedBackward(Scratch& s, int C, int K, int V, int64_t heads)
      : RoundedChunk(s, C, K, V, heads) {
    v = s.take(C * V), d_v = s.take(V), d_out = s.take(C * V), residual = s.take(C * V);
    d_q_on_k = s.take(C * C), d_L = s.take(C * C);
    d_chunk = s.take(K), through_k = s.take(C * LANES);
    out_rows = take_narrow(s, C * V), residual_rows = take_narrow(s, C * V);
    out_and_residual = take_narrow(s, 2 * C * V);
    end_rows = take_narrow(s, heads * K * V);
    end_turned = take_narrow(s, K * V), start_turned = take_narrow(s, K * V);
    delta_turned = take_narrow(s, C * V), reads_turned = take_narrow(s, STRETCH * C);
    asks_turned = take_narrow(s, 2 * C * K);
    by_q = s.take(SQUARE), by_k = s.take(SQUARE), writes = s.take(C * STRETCH);
    for (int level = 0; level < levels(); level++) {
      const int terms = level < LOWER ? STRETCH : half_of(level);
      d_readers[level] = take_narrow(s, C * terms), d_wrote[level] = take_narrow(s, C * terms);
      by_readers[level] = s.take(2 * SQUARE), by_wrote[level] = s.take(SQUARE);
    }
  }

  // Lays out a stop's tokens.
  void stage_stop(const Problem& p, const Stop& stop, const Stop& next) {
    stage_blocks(p, stop, next, [](int) {});
    for (int block = 0; block < C / BLOCK; block++) {
      pack_readers<true>(block);
      pack_wrote<true>(block);
    }
  }

  // The pairs' gradients as left operands: for each cut, or each stretch with several, rows for its
  // readers' queries and then their keys, a term for each token that wrote.
  void pack_pairs() {
    for (int level = 0; level < levels(); level++) {
      const int half = half_of(level), size = cut_size(level), n = to_keys(level);
      const int terms = level < LOWER ? STRETCH : half;
      bf16 *rows = d_readers[level], *columns = d_wrote[level];
      for (int first = 0; first < C; first += size, rows += size * terms, columns += size * terms) {
        for (int i = 0; i < n; i++) {
          const int cut = i / half * 2 * half;  // within the stretch
          const ptrdiff_t at = ptrdiff_t(first + cut + half + i % half) * stride + first;
          const uint32_t mask = level < LOWER ? ((1u << half) - 1) << cut : -1u;
          for (int term = 0; term < terms; term += STRETCH) {
            pack_some(d_q_on_k + at + term, mask, rows + i * terms + term);
            pack_some(d_L + at + term, mask, rows + (n + i) * terms + term);
          }
        }
        pack_left_turned(terms, size, rows, terms, columns);
      }
    }
  }
  static void pack_some(const float* from, uint32_t mask, bf16* to) {  // and 0 for the others
    _mm512_storeu_si512(to, (__m512i)_mm512_maskz_cvtne2ps_pbh(mask, (__m512)load(from + LANES),
                                                                (__m512)load(from)));
  }

  // A stretch of channels, from `column` on: what each token is worth as one that wrote to the
  // chunk's end, and with it the decays' gradients behind the last token.
  void multiply_writes(const Kept& kept, int column) {
    for (int row = 0; row < C; row += STRETCH)
      make_square({V, kept.delta + row * V, V, end_turned + column * STRETCH, K},
                  writes + row * STRETCH);
    for (int j = 0; j < STRETCH; j += LANES) {
      vec behind = splat(1.f), total = load(d_chunk + column + j);
      for (int t = C - 1; t >= 0; t--) {
        float* at = writes + t * STRETCH + j;
        const vec worth = load(at) * behind;
        store(at, worth);
        total += worth * load(k + t * K + column + j);
        behind *= load(decay + t * K + column + j);
      }
      store(d_chunk + column + j, total);
    }
  }

  // All products of a stretch of tokens and channels, from `row` and `column` on.
  void multiply_stretch(int row, int column) {
    const auto product = [&](int terms, const bf16* left, const bf16* right, float* to) {
      make_square({terms, left, terms, right + column * STRETCH, K}, to);
    };
    product(V, out_rows + row * V, start_turned, by_q);
    product(V, residual_rows + row * V, start_turned, by_k);
    for (int level = 0; level < levels(); level++) {
      const int size = cut_size(level), first = row & -size, n = to_keys(level);
      const int terms = level < LOWER ? STRETCH : n;
      const bf16 *rows = d_readers[level] + first * terms;
      const bf16* columns = d_wrote[level] + first * terms;
      const bf16 *right_wrote = wrote[level] + first * K, *right_read = readers[level] + first * K;
      if (level < LOWER) {
        product(terms, rows, right_wrote, by_readers[level]);
        product(size, columns, right_read, by_wrote[level]);
      } else if (row - first >= n) {
        rows += (row - first - n) * terms;
        product(terms, rows, right_wrote, by_readers[level]);
        product(terms, rows + n * terms, right_wrote, by_readers[level] + SQUARE);
      } else {
        product(size, columns + (row - first) * size, right_read, by_wrote[level]);
      }
    }
  }

  // Joins them: for those that read. Pairs of NEAR tokens join in fp32.
  void join_readers(int row, int column) {
    for (int i = 0; i < STRETCH; i += BLOCK)
      for (int j = 0; j < STRETCH; j += LANES) {
        const int first = row + i, at = first * K + column + j, here = i * STRETCH + j;
        struct {
          const float *q, *k;
          vec by;
        } parts[LEVELS];
        Side side[LEVELS];
        const int count = sides<true>(first / BLOCK, column + j, side);
        for (int s = 0; s < count; s++) {
          const float* queries = by_readers[side[s].level] + (side[s].level < LOWER ? j : here);
          const int to_k = side[s].level < LOWER ? BLOCK * STRETCH : SQUARE;
          parts[s] = {queries, queries + to_k, side[s].by};
        }
        const vec whole = through(0, first / BLOCK, column + j);
        const float* inner[INNER];
        for (int l = 0; l < INNER; l++) inner[l] = by_readers[l] + i / 2 * STRETCH + j;
        vec within[INNER + 1], faded[NEAR];
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) {
          const vec fade = load(decay + at + t * K);
          const float* d_reads = d_q_on_k + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          const float* d_recalls = d_L + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          faded[t % NEAR] = load(k + at + t * K);
          vec to_q = faded[t % NEAR] * splat(d_reads[t % NEAR]), to_k = {};
#pragma GCC unroll 4
          for (int s = 0; s < t % NEAR; s++) {
            faded[s] *= fade;
            to_q += faded[s] * splat(d_reads[s]);
            to_k += faded[s] * splat(d_recalls[s]);
          }
#pragma GCC unroll 3
          for (int l = 0; l <= INNER; l++) {
            const int size = NEAR << l;
            within[l] = t % size ? within[l] * fade : fade;
            if (l == INNER || t / size % 2 == 0) continue;
            const float* from = inner[l] + (t / (2 * size) * size + t % size) * STRETCH;
            to_q += load(from) * within[l];
            to_k += load(from + BLOCK * STRETCH) * within[l];
          }
          for (int s = 0; s < count; s++) {
            const vec by = within[INNER] * parts[s].by;
            to_q += load(parts[s].q + t * STRETCH) * by;
            to_k += load(parts[s].k + t * STRETCH) * by;
          }
          const vec by = within[INNER] * whole;
          float *q_at = by_q + here + t * STRETCH, *k_at = by_k + here + t * STRETCH;
          store(q_at, to_q + load(q_at) * by);
          store(k_at, to_k + load(k_at) * by);
        }
      }
  }

  // For those that wrote, and so for keys and decays. Every factor is exp(G_i - G_j): G gains where
  // its row reads and loses where it writes, and a token's decay is in every G from its own on.
  void join_wrote(int row, int column) {
    for (int i = STRETCH - BLOCK; i >= 0; i -= BLOCK)
      for (int j = 0; j < STRETCH; j += LANES) {
        const int first = row + i, at = first * K + column + j, here = i * STRETCH + j;
        struct {
          const float* from;
          vec by;
        } parts[LEVELS];
        Side side[LEVELS];
        const int count = sides<false>(first / BLOCK, column + j, side);
        for (int s = 0; s < count; s++) parts[s] = {by_wrote[side[s].level] + here, side[s].by};
        vec within[INNER + 1], worth[NEAR], total = load(d_chunk + column + j), later = splat(1.f);
#pragma GCC unroll 16
        for (int t = BLOCK - 1; t >= 0; t--) {
          const int e = at + t * K;
          const vec fade = load(decay + e), query = load(q + e), key = load(k + e);
          const vec strength = splat(beta[first + t]), recalling = key * strength;
          const float* d_reads = d_q_on_k + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          const float* d_recalls = d_L + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          float* writes_at = writes + (first + t) * STRETCH + j;
          vec writing = load(writes_at) + query * splat(d_reads[t % NEAR]);
          if (t % NEAR < NEAR - 1) writing += worth[t % NEAR];
#pragma GCC unroll 4
          for (int s = 0; s < t % NEAR; s++) {
            const vec one = query * splat(d_reads[s]) + recalling * splat(d_recalls[s]);
            worth[s] = (t % NEAR < NEAR - 1 ? worth[s] + one : one) * fade;
          }
#pragma GCC unroll 3
          for (int l = 0; l <= INNER; l++) {
            const int size = NEAR << l;
            within[l] = (t + 1) % size ? within[l] * later : splat(1.f);
            if (l < INNER && t / size % 2 == 0)
              writing += load(by_wrote[l] + here + t * STRETCH) * within[l];
          }
          later = fade;
          for (int s = 0; s < count; s++)
            writing += load(parts[s].from + t * STRETCH) * (within[INNER] * parts[s].by);

          float *k_at = by_k + here + t * STRETCH, *sums = through_k + (first + t) * LANES;
          vec read = load(k_at);
          store(sums, load(sums) + key * read);
          read *= strength;
          total += query * load(by_q + here + t * STRETCH) + key * (read - writing);
          // exp(-inf) has slope 0; do not leave rounding
          store(writes_at, fade == vec{} ? vec{} : total);
          store(k_at, read + writing);
        }
        store(d_chunk + column + j, total);
      }
  }
};

void backward_rounded(const Problem& p, const Gradients& d, int64_t n, Heads heads) {
  const Tiles tiles(true);
  auto piece = in_one_piece<RoundedBackward>(p, heads, STRETCH);
  RoundedBackward& c = piece.rooms;
  const int K = c.K, V = c.V, stride = c.stride;
  const Outputs outputs(p, d);
  read_memories(p, d.final_memory, n, heads, V, K, c.memories);
  for (int64_t i = 0; i < heads.end - heads.first; i++)
    pack_both<false>(V, K, c.memories + i * K * V, c.memories_right + i * K * V,
                     c.end_rows + i * K * V);
  for (int level = 0; level < LOWER; level++) memset(c.wrote[level], 0, sizeof(bf16) * stride * K);

  each_stop(p, n, heads, false, [&](const Stop& stop, const Stop& next) {
    const int64_t own = (stop.value_head - heads.first) * K * V;
    bf16 *end = c.memories_right + own, *end_rows = c.end_rows + own;
    const Kept kept(p, stop);
    c.stage_stop(p, stop, next);
    const int C = c.C;
    c.stage_values(p, d.out, stop, c.d_out);
    ask_for_backward<bf16, STRETCH>(p, d, next);

    // What each delta is worth, then each residual (beta v - beta k M).
    pack_both<false>(V, C, c.d_out, c.out_and_residual, c.out_rows);
    for (int first = 0; first < C; first += STRETCH) {
      pack_left_turned(STRETCH, C - first, kept.q_on_k + first * C + first, C, c.reads_turned);
      gemm_packed<false>(STRETCH, V, C - first, c.reads_turned, C - first,
                         c.out_and_residual + first * V, V, c.residual + first * V, V);
    }
    gemm_packed<true>(C, V, K, c.wrote[WHOLE], K, end, V, c.residual, V);
    c.solve_transposed(kept.system, c.residual);
    pack_both<false>(V, C, c.residual, c.out_and_residual + C * V, c.residual_rows, -1);

    // Through the pairs' two matrices.
    pack_turned(C, V, kept.delta, c.delta_turned);
    for (int first = 0; first < C; first += STRETCH) {
      const ptrdiff_t at = ptrdiff_t(first) * stride;
      gemm_packed<false>(STRETCH, first + STRETCH, V, c.out_rows + first * V, V, c.delta_turned, C,
                         c.d_q_on_k + at, stride);
      gemm_packed<false>(STRETCH, first + STRETCH, V, c.residual_rows + first * V, V,
                         c.delta_turned, C, c.d_L + at, stride);
    }
    c.pack_pairs();

    // Through the memory at the chunk's start and the one at its end. Queries read of the memory
    // and residuals were read from it: one product over both.
    for (int row = 0; row < K; row++) {
      __m512 total = {};
      for (int j = row * V; j < (row + 1) * V; j += STRETCH)
        total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(kept.start + j),
                                 (__m512bh)_mm512_loadu_si512(end_rows + j));
      c.d_chunk[row] = sum((vec)total) * c.chunk_decay[row];
    }
    pack_turned(K, V, kept.start, c.start_turned);
    pack_turned(K, V, end_rows, c.end_turned);
    pack_left_turned(K, 2 * C, c.readers[WHOLE], K, c.asks_turned);
    c.advance<false>(c.memories + own, c.asks_turned, 2 * C, c.out_and_residual, end, end_rows);

    memset(c.through_k, 0, sizeof(float) * C * LANES);
    for (int column = 0; column < K; column += STRETCH) {
      c.multiply_writes(kept, column);
      for (int row = C - STRETCH; row >= 0; row -= STRETCH) {
        c.multiply_stretch(row, column);
        c.join_readers(row, column);
        c.join_wrote(row, column);
        const int64_t rows = std::min<int64_t>(stop.tokens - row, STRETCH);
        outputs.put_keys(stop, row, rows, column, STRETCH, c.by_q, c.by_k,
                         c.writes + row * STRETCH);
      }
    }
    c.stage_values(p, p.v, stop, c.v);
    for (int64_t row = 0; row < stop.tokens; row++) {
      const float through_v = c.value_backward(row, c.residual, c.v, c.d_v);
      outputs.put_values(stop, row, c.d_v, sum(load(c.through_k + row * LANES)) + through_v);
    }
  });
  write_memories(p, c.memories, n, heads, V, K, d.memory);
  finish_stores_past_caches();
}
#else
void backward_rounded(const Problem&, const Gradients&, int64_t, Heads) {}
#endif

}  // namespace
