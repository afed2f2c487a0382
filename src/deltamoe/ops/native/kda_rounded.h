// Kimi Delta Attention over chunks with products on AMX's tiles: their operands are rounded to bf16,
// sums are fp32, and so is the triangular solve. What the backward pass wants of an operand is kept
// as it was rounded.
//
// Tiles multiply so much faster than operands come that passes over a chunk are what costs. So one
// pass over its tokens makes all operands that queries, keys and decays go into, while a block of 16
// tokens is in the nearest cache; and backward one pass, a stretch of 32 tokens and 32 channels at a
// time, takes all products to the gradients. Survival by halves goes on down to 4 tokens: there are
// levels of cuts with 4, 8, 16, ... tokens on either side, and the pairs across all cuts of a level
// are one product.
#pragma once

#include "gemm_bf16.h"
#include "kda_chunk.h"

namespace {

bool rounds_products(bool is_bf16, int64_t chunk) {
  return is_bf16 && chunk >= 32 && amx_granted();
}

#if HAS_TILES
constexpr int NEAR = 4;             // tokens between which nothing is rounded
constexpr int STRETCH = 32;         // terms of a tile, rows and columns of two
constexpr int INNER = 2;            // levels within a block
constexpr int LOWER = 3;            // levels within a stretch
constexpr int LEVELS = 5;           // at most: 64 tokens on either side
constexpr int WHOLE = LEVELS;       // all read the chunk's start, and write to its end
constexpr int SQUARE = STRETCH * STRETCH;

using Kept = Saved<bf16, STRETCH>;

void make_square(const Terms& product, float* to) {
  block_product<false, 2, 2>(&product, 1, to, STRETCH);
}

bf16* take_narrow(Scratch& s, size_t numbers) {
  return reinterpret_cast<bf16*>(s.take(numbers / 2));
}

struct RoundedChunk : Chunk {
  float* totals;       // [blocks, K]: the products of their decays
  float* chunk_decay;  // [K]: of all of them
  bf16* readers[LEVELS + 1];  // queries, and keys times beta: times the decay from the cut
  bf16* wrote[LEVELS + 1];    // keys times the decay to the cut
  float* memories;            // of the task's heads, or their gradients
  bf16* memories_right;       // the same, right of a product

  RoundedChunk(Scratch& s, int C, int K, int V, int64_t heads) : Chunk(s, C, K, V) {
    totals = s.take(C / BLOCK * K), chunk_decay = s.take(K);
    for (int level = 0; level < levels(); level++) {
      readers[level] = take_narrow(s, C * K);
      wrote[level] = take_narrow(s, C * K);
    }
    readers[WHOLE] = take_narrow(s, 2 * C * K);
    wrote[WHOLE] = take_narrow(s, C * K);
    memories = s.take(heads * K * V);
    memories_right = take_narrow(s, heads * K * V);
  }

  int levels() const { return __builtin_ctz(C / NEAR); }
  static int half_of(int level) { return NEAR << level; }
  // Of a level's cut, or of a stretch with several: tokens, and of these from queries to keys.
  static int cut_size(int level) { return level < LOWER ? STRETCH : 2 * half_of(level); }
  static int to_keys(int level) { return cut_size(level) / 2; }  // from their queries
  // Whether a block, or a stretch, is behind its level's cut.
  static bool block_reads(int level, int block) { return block >> (level - INNER) & 1; }
  static bool stretch_reads(int level, int stretch) { return stretch >> (level - LOWER) & 1; }
  // A token's number among its level's readers, or among those who wrote.
  static int number(int level, int token) {
    if (level == WHOLE) return token;
    const int half = half_of(level);
    return (token & -2 * half) / 2 + token % half;
  }

  // The decay through the blocks from `first` to `end`, of 16 channels.
  vec through(int first, int end, int j) const {
    vec product = splat(1.f);
    for (int block = first; block < end; block++) product *= load(totals + block * K + j);
    return product;
  }

  // A level's cut before a block, or behind it, and the decay in between.
  struct Side {
    int level;
    vec by;
  };
  template <bool reads>
  int sides(int block, int j, Side* to) const {
    int count = 0;
    for (int level = INNER; level < levels(); level++) {
      const int blocks = half_of(level) / BLOCK, first = block & -blocks;
      if (block_reads(level, block) != reads) continue;
      to[count++] = {level, reads ? through(first, block, j) : through(block + 1, first + blocks, j)};
    }
    return count;
  }

  // Bring a stop's tokens near; visit(first token of a block) while it is in the nearest cache.
  template <class Visit>
  void stage_blocks(const Problem& p, const Stop& at, const Stop& next, Visit visit) {
    begin(at, STRETCH);
    for (int first = 0; first < C; first += BLOCK) {
      stage(p, at, next, first, first + BLOCK);
      visit(first);
      for (int j = 0; j < K; j += LANES) {
        vec product = splat(1.f);
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) product *= load(decay + (first + t) * K + j);
        store(totals + first / BLOCK * K + j, product);
      }
    }
    for (int j = 0; j < K; j += LANES) store(chunk_decay + j, through(0, C / BLOCK, j));
  }

  // Makes a block's part of all operands, two tokens and 16 channels at a time. Those of the memory,
  // at WHOLE, are rows: queries below each other and then keys, or those who wrote. So are the
  // levels' forward; where they are `turned`, they are to stand right of a product, as terms.
  template <bool turned>
  void sweep(int block) {
    constexpr int SIZES[INNER + 1] = {NEAR, 2 * NEAR, BLOCK};
    const int first = block * BLOCK, width = K, step = turned ? LANES : width;
    const float *queries = q + first * K, *keys = k + first * K, *decays = decay + first * K;
    const float* strengths = beta + first;
    struct Part {
      bf16 *q, *k;
      vec by;
    };
    const auto place = [&](bf16* all, int line, int j) {
      return turned ? all + line / 32 * 32 * width + j * 32 + line % 32 * LANES
                    : all + line * width + j;
    };
    for (int j = 0; j < width; j += LANES) {
      const auto readers_part = [&](int level, vec by) {
        const int half = turned ? to_keys(level) : C / 2;
        const int line = number(level, first) + (turned ? (first & -cut_size(level)) / 2 : 0);
        return Part{place(readers[level], line, j), place(readers[level], line + half, j), by};
      };
      const auto wrote_part = [&](int level, vec by) {
        return Part{nullptr, place(wrote[level], turned ? first : number(level, first), j), by};
      };
      Part inner[INNER], parts[LEVELS];
      Side side[LEVELS];
      vec within[INNER + 1];
      for (int l = 0; l < INNER; l++) inner[l] = readers_part(l, vec{});
      int count = sides<true>(block, j, side);
      for (int s = 0; s < count; s++) parts[s] = readers_part(side[s].level, side[s].by);
      const vec since = through(0, block, j);
      bf16* asks = readers[WHOLE] + first * width + j;
      bf16* recalls = asks + C * width;
#pragma GCC unroll 8
      for (int t = 0; t < BLOCK; t += 2) {
        const int at = t * width + j;
        const vec q_1 = load(queries + at), q_2 = load(queries + at + width);
        const vec k_1 = load(keys + at) * splat(strengths[t]);
        const vec k_2 = load(keys + at + width) * splat(strengths[t + 1]);
        const vec fade = load(decays + at), later = load(decays + at + width);
        vec here[INNER + 1];
#pragma GCC unroll 3
        for (int l = 0; l <= INNER; l++) {
          here[l] = t % SIZES[l] ? within[l] * fade : fade;
          within[l] = here[l] * later;
        }
#pragma GCC unroll 2
        for (int l = 0; l < INNER; l++) {
          if (t / SIZES[l] % 2 == 0) continue;
          const int to = (t / (2 * SIZES[l]) * SIZES[l] + t % SIZES[l]) * step;
          put_two<turned>(inner[l].q + to, step, q_1 * here[l], q_2 * within[l]);
          put_two<turned>(inner[l].k + to, step, k_1 * here[l], k_2 * within[l]);
        }
        const vec asking_1 = q_1 * here[INNER], asking_2 = q_2 * within[INNER];
        const vec recalling_1 = k_1 * here[INNER], recalling_2 = k_2 * within[INNER];
        for (int s = 0; s < count; s++) {
          const vec by = parts[s].by;
          put_two<turned>(parts[s].q + t * step, step, asking_1 * by, asking_2 * by);
          put_two<turned>(parts[s].k + t * step, step, recalling_1 * by, recalling_2 * by);
        }
        put_two<false>(asks + t * width, width, asking_1 * since, asking_2 * since);
        // minus, for residuals are what a value differs by
        put_two<false>(recalls + t * width, width, -recalling_1 * since, -recalling_2 * since);
      }

      for (int l = 0; l < INNER; l++) inner[l] = wrote_part(l, vec{});
      count = sides<false>(block, j, side);
      for (int s = 0; s < count; s++) parts[s] = wrote_part(side[s].level, side[s].by);
      const vec until = through(block + 1, C / BLOCK, j);
      bf16* ends = wrote[WHOLE] + first * width + j;
#pragma GCC unroll 8
      for (int t = BLOCK - 2; t >= 0; t -= 2) {
        const int at = t * width + j;
        const vec k_1 = load(keys + at), k_2 = load(keys + at + width);
        const vec fade = load(decays + at + width);
        const vec later = t + 2 < BLOCK ? load(decays + at + 2 * width) : splat(1.f);
        vec behind[INNER + 1];
#pragma GCC unroll 3
        for (int l = 0; l <= INNER; l++) {
          behind[l] = (t + 2) % SIZES[l] ? within[l] * later : splat(1.f);
          within[l] = behind[l] * fade;
        }
#pragma GCC unroll 2
        for (int l = 0; l < INNER; l++) {
          if (t / SIZES[l] % 2) continue;
          const int to = turned ? t : t / (2 * SIZES[l]) * SIZES[l] + t % SIZES[l];
          put_two<turned>(inner[l].k + to * step, step, k_1 * within[l], k_2 * behind[l]);
        }
        const vec writing_1 = k_1 * within[INNER], writing_2 = k_2 * behind[INNER];
        for (int s = 0; s < count; s++) {
          const vec by = parts[s].by;
          put_two<turned>(parts[s].k + t * step, step, writing_1 * by, writing_2 * by);
        }
        put_two<false>(ends + t * width, width, writing_1 * until, writing_2 * until);
      }
    }
  }

  // A head's memory M = decay * M + A B, where A has rows of `depth` terms, and what becomes of it
  // as an operand of the head's next stop.
  template <bool streams>
  void advance(float* M, const bf16* a, int depth, const bf16* b, bf16* right, bf16* rows) const {
    alignas(64) float squares[2][SQUARE];
    const int high = K / STRETCH, count = high * (V / STRETCH);
    // A tile is long on its way to memory: each square is added while the next one is made.
    for (int i = 0; i <= count; i++) {
      if (i < count) {
        const int row = i % high * STRETCH, column = i / high * STRETCH;
        make_square({depth, a + row * depth, depth, b + column * STRETCH, V}, squares[i % 2]);
      }
      if (i == 0) continue;
      const int first = (i - 1) % high * STRETCH, column = (i - 1) / high * STRETCH;
      const float* add = squares[(i - 1) % 2];
      for (int row = first; row < first + STRETCH; row += 2, add += 2 * STRETCH) {
        float *here = M + row * V + column, *next = here + V;
        const vec fade = splat(chunk_decay[row]), next_fade = splat(chunk_decay[row + 1]);
        const vec low = load(here) * fade + load(add);
        const vec high = load(here + LANES) * fade + load(add + LANES);
        const vec next_low = load(next) * next_fade + load(add + STRETCH);
        const vec next_high = load(next + LANES) * next_fade + load(add + STRETCH + LANES);
        store(here, low), store(here + LANES, high);
        store(next, next_low), store(next + LANES, next_high);
        bf16* to = rows ? rows + row * V + column : nullptr;
        pack_two<streams>(low, high, next_low, next_high,
                          right + first * V + column * STRETCH + (row - first) * LANES, to, to + V);
      }
    }
  }

  // Two tokens' numbers to their rows, or one beside the other.
  template <bool turned>
  static void put_two(bf16* to, int step, vec first, vec second) {
    if (turned) {
      _mm512_storeu_si512(to, bf16_pairs(first, second));
    } else {
      const __m512i both = bf16_both(first, second);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + step), _mm512_extracti64x4_epi64(both, 1));
    }
  }
};

// --- forward ------------------------------------------------------------------------------------

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

  // What row i reads of column j <= i with its query (q_on_k, zero above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1. Leaves
  // the operands of products with the memory at `WHOLE`.
  void pairs(const Problem& p, const Stop& stop, const Stop& next, float* system) {
    memset(q_on_k, 0, sizeof(float) * stride * stride);
    stage_blocks(p, stop, next, [&](int first) {
      for (int near = 0; near < BLOCK; near += NEAR) near_pairs(first + near, system);
    });
    for (int block = 0; block < C / BLOCK; block++) sweep<false>(block);
    for (int level = 0; level < levels(); level++) cross(level, system);
    invert_diagonal(system);
  }

  // All pairs of NEAR tokens in fp32.
  void near_pairs(int first, float* L) {
    vec by_q[NEAR][NEAR] = {}, by_k[NEAR][NEAR] = {};
    for (int j = first * K; j < (first + 1) * K; j += LANES) {
      vec wrote[NEAR];
#pragma GCC unroll 4
      for (int t = 0; t < NEAR; t++) {
        const vec fade = load(decay + j + t * K), query = load(q + j + t * K);
        wrote[t] = load(k + j + t * K);
        by_q[t][t] += wrote[t] * query;
#pragma GCC unroll 4
        for (int s = 0; s < t; s++) {
          wrote[s] *= fade;
          by_q[t][s] += wrote[s] * query;
          by_k[t][s] += wrote[s] * wrote[t];
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
    c.stage_values(p, p.v, stop, c.delta);
    for (int row = 0; row < C; row++)
      for (int j = 0; j < V; j += LANES)
        store(c.delta + row * V + j, load(c.delta + row * V + j) * splat(c.beta[row]));
    gemm_packed<true>(C, V, K, recalls, K, start, V, c.delta, V);
    c.solve(system, c.delta);
    pack_both<streams>(V, C, c.delta, c.written, kept.delta);

    pack_left(C, C, {c.q_on_k, stride, 1}, 1.f, reads);
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

// --- backward -----------------------------------------------------------------------------------

// Levels' operands stand right of a product here: tokens are terms, channels are columns. Who wrote
// has its own place among the tokens; what lies between is 0, or not read. For readers, each cut,
// or each stretch, has its queries and then its keys.
struct RoundedBackward : RoundedChunk {
  float *v, *d_v, *d_out, *residual;  // gradients, but for v
  float *d_q_on_k, *d_L;
  float *d_chunk, *through_k;         // of all channels, and of all rows, a vector each, to be summed
  bf16 *out_rows, *residual_rows;     // left of a product; these times -1
  bf16* out_and_residual;             // right of it, one below the other
  bf16 *end_rows, *end_turned, *start_turned, *delta_turned, *reads_turned, *asks_turned;
  bf16 *d_readers[LEVELS], *d_wrote[LEVELS];  // left of it: what pairs are worth, and turned

  // Of a stretch of tokens and channels, before they are joined: what is read of the chunk's start,
  // then all gradients of queries and of keys that read; what each level's readers get, queries
  // and keys, and what those who wrote get. Of all tokens and these channels, all gradients of keys
  // that wrote, then of the decays.
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
      d_readers[level] = take_narrow(s, C * (C > 2 * STRETCH ? C / 2 : STRETCH));
      d_wrote[level] = take_narrow(s, C * (C > 2 * STRETCH ? C / 2 : STRETCH));
      by_readers[level] = s.take(2 * SQUARE), by_wrote[level] = s.take(SQUARE);
    }
  }

  // Lays out a stop's tokens.
  void stage_stop(const Problem& p, const Stop& stop, const Stop& next) {
    stage_blocks(p, stop, next, [](int) {});
    for (int block = 0; block < C / BLOCK; block++) sweep<true>(block);
  }

  // What pairs are worth, for each cut of each level.
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
      const bf16 *rows = d_readers[level] + first * terms, *columns = d_wrote[level] + first * terms;
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

  // Joins them: for those that read.
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
          const float* q = by_readers[side[s].level] + (side[s].level < LOWER ? j : here);
          const int to_k = side[s].level < LOWER ? BLOCK * STRETCH : SQUARE;
          parts[s] = {q, q + to_k, side[s].by};
        }
        const vec whole = through(0, first / BLOCK, column + j);
        const float* inner[INNER];
        for (int l = 0; l < INNER; l++) inner[l] = by_readers[l] + i / 2 * STRETCH + j;
        vec within[INNER + 1], wrote[NEAR];
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) {
          const vec fade = load(decay + at + t * K);
          const float* d_reads = d_q_on_k + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          const float* d_recalls = d_L + ptrdiff_t(first + t) * stride + first + t / NEAR * NEAR;
          wrote[t % NEAR] = load(k + at + t * K);
          vec to_q = wrote[t % NEAR] * splat(d_reads[t % NEAR]), to_k = {};
#pragma GCC unroll 4
          for (int s = 0; s < t % NEAR; s++) {
            wrote[s] *= fade;
            to_q += wrote[s] * splat(d_reads[s]);
            to_k += wrote[s] * splat(d_recalls[s]);
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
          vec wrote = load(writes_at) + query * splat(d_reads[t % NEAR]);
          if (t % NEAR < NEAR - 1) wrote += worth[t % NEAR];
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
              wrote += load(by_wrote[l] + here + t * STRETCH) * within[l];
          }
          later = fade;
          for (int s = 0; s < count; s++)
            wrote += load(parts[s].from + t * STRETCH) * (within[INNER] * parts[s].by);

          float *k_at = by_k + here + t * STRETCH, *sums = through_k + (first + t) * LANES;
          vec read = load(k_at);
          store(sums, load(sums) + key * read);
          read *= strength;
          total += query * load(by_q + here + t * STRETCH) + key * (read - wrote);
          // exp(-inf) has slope 0; do not leave rounding
          store(writes_at, fade == vec{} ? vec{} : total);
          store(k_at, read + wrote);
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
    for (int64_t row = 0; row < next.tokens; row++)
      prefetch_row(d.out, next.batch, next.start + row, next.value_head, p.value_dim);
    if (next.tokens) Kept::ask_for(p, next);

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

    // Through the memory at the chunk's start and the one at its end. Queries read of the memory and
    // residuals were read from it: one product over both.
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
        const int64_t rows = stop.tokens - row;
        outputs.put_keys(stop, row, rows < STRETCH ? rows : STRETCH, column, STRETCH, c.by_q, c.by_k,
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
template <bool>
void forward_rounded(const Problem&, int64_t, Heads) {}
void backward_rounded(const Problem&, const Gradients&, int64_t, Heads) {}
#endif

}  // namespace
