// Forward over chunks with rounded products.
#pragma once

#include "kda_rounded.h"

namespace {

#if HAS_TILES
struct RoundedForward : RoundedChunk {
  float *own_system, *q_on_k, *delta, *out;
  float* crossed;  // of one level's readers with all who wrote
  bf16 *written, *own_reads, *turned, *ends;

  RoundedForward(Scratch& s, int C, int K, int V, int64_t heads)
      : RoundedChunk(s, C, K, V, heads) {
    own_system = s.take(C * C), q_on_k = s.take(C * C);
    delta = s.take(C * V), out = s.take(C * V);
    crossed = s.take(C * C / 2);
    written = take_narrow(s, C * V);
    own_reads = take_narrow(s, C * C);
    turned = take_narrow(s, C / 2 * K), ends = take_narrow(s, K * C);
  }

  // What row i reads of column j <= i with its query (q_on_k, left 0 above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1. Leaves
  // the operands of products with the memory at `WHOLE`.
  void pairs(const Problem& p, const Stop& stop, const Stop& next, float* system) {
    stage_blocks(p, stop, next, [&](int first) {
      for (int near = 0; near < BLOCK; near += NEAR) near_pairs(first + near, system);
    });
    for (int block = 0; block < C / BLOCK; block++) {
      pack_readers<false>(block);
      pack_wrote<false>(block);
    }
    for (int level = 0; level < levels(); level++) cross(level, system);
    invert_diagonal(system);
  }

  // All pairs of NEAR tokens in fp32.
  void near_pairs(int first, float* L) {
    vec by_q[NEAR][NEAR] = {}, by_k[NEAR][NEAR] = {};
    for (int j = first * K; j < (first + 1) * K; j += LANES) {
      vec faded[NEAR];
#pragma GCC unroll 4
      for (int t = 0; t < NEAR; t++) {
        const vec fade = load(decay + j + t * K), query = load(q + j + t * K);
        faded[t] = load(k + j + t * K);
        by_q[t][t] += faded[t] * query;
#pragma GCC unroll 4
        for (int s = 0; s < t; s++) {
          faded[s] *= fade;
          by_q[t][s] += faded[s] * query;
          by_k[t][s] += faded[s] * faded[t];
        }
      }
    }
    for (int t = 0; t < NEAR; t++) {
      const ptrdiff_t at = ptrdiff_t(first + t) * stride + first;
      for (int s = 0; s <= t; s++) q_on_k[at + s] = sum(by_q[t][s]);
      for (int s = 0; s < t; s++) L[at + s] = sum(by_k[t][s]) * beta[first + t];
    }
  }

  // All cuts of a level: a row for each reader's query, then for each one's key, a column for each
  // who wrote. Of the product only what belongs to one cut is used.
  void cross(int level, float* system) {
    const int n = C / 2, half = half_of(level);
    pack_turned(n, K, wrote[level], turned);
    gemm_packed<false>(C, n, K, readers[level], K, turned, n, crossed, n);
    for (int i = 0; i < n; i++) {
      const float *by_q = crossed + i * n + i / half * half, *by_k = by_q + n * n;
      const int cut = i / half * 2 * half + half;
      const ptrdiff_t at = ptrdiff_t(cut + i % half) * stride + cut - half;
      for (int j = 0; j < half; j += NEAR) {
        memcpy(q_on_k + at + j, by_q + j, sizeof(float) * NEAR);
        memcpy(system + at + j, by_k + j, sizeof(float) * NEAR);
      }
    }
  }
};

template <bool streams>  // past the caches what nothing reads soon
void forward_rounded(const Problem& p, int64_t n, Heads heads) {
  const Tiles tiles(true);
  auto piece = in_one_piece<RoundedForward>(p, heads, STRETCH);
  RoundedForward& c = piece.rooms;
  const int K = c.K, V = c.V, stride = c.stride;
  const auto put_row = streams ? write_far_row : write_row;
  const int64_t end = p.start[n] + p.length[n];
  memset(c.q_on_k, 0, sizeof(float) * stride * stride);
  read_memories(p, p.memory, n, heads, V, K, c.memories);
  for (int64_t i = 0; i < (p.length[n] ? heads.end - heads.first : 0); i++)
    pack_both<false>(V, K, c.memories + i * K * V, c.memories_right + i * K * V,
                     Kept(p, Stop(p, n, heads, i, true)).start);

  each_stop(p, n, heads, true, [&](const Stop& stop, const Stop& next) {
    const int64_t at = (stop.value_head - heads.first) * K * V;
    bf16* start = c.memories_right + at;
    Stop later = stop;  // of the same head
    later.chunk++;
    const Kept kept(p, stop);
    float* system = kept.system ? kept.system : c.own_system;
    bf16* reads = kept.q_on_k ? kept.q_on_k : c.own_reads;

    c.pairs(p, stop, next, system);
    const int C = c.C;
    const bf16 *asks = c.readers[WHOLE], *recalls = asks + C * K;
    c.stage_written(p, stop, c.delta);
    gemm_packed<true>(C, V, K, recalls, K, start, V, c.delta, V);
    c.solve(system, c.delta);
    pack_both<streams>(V, C, c.delta, c.written, kept.delta);

    pack_left(C, C, {c.q_on_k, stride, 1}, reads);
    for (int column = 0; column < V; column += STRETCH)
      for (int row = 0; row < C; row += STRETCH) {
        const int right = column * STRETCH;
        const Terms terms[] = {{K, asks + row * K, K, start + right, V},
                               {row + STRETCH, reads + row * C, C, c.written + right, V}};
        block_product<false, 2, 2>(terms, 2, c.out + row * V + column, V);
      }
    for (int64_t row = 0; row < stop.tokens; row++)
      put_row(p.out, stop.batch, stop.start + row, stop.value_head, p.value_dim, c.out + row * V);

    pack_left_turned(K, C, c.wrote[WHOLE], K, c.ends);
    const bool is_last = stop.start + stop.tokens == end;
    c.advance<streams>(c.memories + at, c.ends, C, c.written, start,
                       is_last ? nullptr : Kept(p, later).start);
  });
  write_memories(p, c.memories, n, heads, V, K, p.final_memory);
  finish_stores_past_caches();
}
#else
template <bool>
void forward_rounded(const Problem&, int64_t, Heads) {}
#endif

}  // namespace
