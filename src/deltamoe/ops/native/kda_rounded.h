// A chunk of Kimi Delta Attention with products on AMX's tiles: their operands are rounded to bf16,
// sums are fp32, and so is the triangular solve. What the backward pass wants of an operand is kept
// as it was rounded.
//
// Tiles multiply so much faster than operands come that it is passes over a chunk that cost. So
// one pass over its tokens makes all operands that queries, keys and decays go into, a block of 16
// tokens and 16 channels at a time; and backward one pass, a stretch of 32 tokens and 32 channels
// at a time, takes all products to the gradients. Survival by halves goes on down to 4 tokens:
// there are levels of cuts with 4, 8, 16, ... tokens on either side, and the pairs across all cuts
// of a level are one product.
#pragma once

#include "gemm_bf16.h"
#include "kda_chunk.h"

namespace {

bool rounds_products(bool is_bf16, int64_t chunk) {
  return is_bf16 && chunk >= 32 && amx_granted();
}

#if HAS_TILES
constexpr int NEAR = 4;        // tokens between which nothing is rounded
constexpr int STRETCH = 32;    // terms of a tile, rows and columns of two
constexpr int INNER = 2;       // levels within a block
constexpr int LOWER = 3;       // levels within a stretch
constexpr int LEVELS = 5;      // at most: 64 tokens on either side
constexpr int WHOLE = LEVELS;  // all read the chunk's start, and write to its end
constexpr int SQUARE = STRETCH * STRETCH;

using Kept = Saved<bf16, STRETCH>;

void make_square(const Terms& product, float* to) {
  block_product<false, 2, 2>(&product, 1, to, STRETCH);
}

bf16* take_narrow(Scratch& s, size_t numbers) {
  return reinterpret_cast<bf16*>(s.take(numbers / 2));
}

struct RoundedChunk : Chunk {
  float* totals;              // [blocks, K]: the products of their decays
  float* chunk_decay;         // [K]: of all of them
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
  static constexpr int half_of(int level) { return NEAR << level; }
  // Of a level's cut, or of a stretch with several: its tokens, and from readers' queries to keys.
  static int cut_size(int level) { return level < LOWER ? STRETCH : 2 * half_of(level); }
  static int to_keys(int level) { return cut_size(level) / 2; }
  // A token's number among its level's readers, or among those who wrote.
  static int number(int level, int token) {
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
      if (bool(block & blocks) != reads) continue;
      const vec by = reads ? through(first, block, j) : through(block + 1, first + blocks, j);
      to[count++] = {level, by};
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

  // Where a line of an operand begins, of channels j to j + 15: a row, or, where operands are
  // `turned`, a term of what stands right of a product.
  template <bool turned>
  bf16* place(bf16* operand, int line, int j) const {
    return turned ? operand + line / 32 * 32 * K + j * 32 + line % 32 * LANES
                  : operand + line * K + j;
  }

  // Makes a block's part of all readers' operands, two tokens and 16 channels at a time: queries
  // and then keys, each as many as read, of the chunk's start (WHOLE, keys times -beta) and of the
  // levels. Where these are `turned`, it is queries and then keys for each cut, or each stretch
  // with several.
  template <bool turned>
  void pack_readers(int block) const {
    const int first = block * BLOCK, width = K, step = turned ? LANES : width;
    const float *queries = q + first * K, *keys = k + first * K, *decays = decay + first * K;
    const float* strengths = beta + first;
    struct Part {
      bf16 *q, *k;
      vec by;
    };
    for (int j = 0; j < width; j += LANES) {
      const auto part = [&](int level, vec by) {
        const int half = turned ? to_keys(level) : C / 2;
        const int line = number(level, first) + (turned ? (first & -cut_size(level)) / 2 : 0);
        bf16* all = readers[level];
        return Part{place<turned>(all, line, j), place<turned>(all, line + half, j), by};
      };
      Part inner[INNER], parts[LEVELS];
      Side side[LEVELS];
      vec within[INNER + 1];
      for (int l = 0; l < INNER; l++) inner[l] = part(l, vec{});
      const int count = sides<true>(block, j, side);
      for (int s = 0; s < count; s++) parts[s] = part(side[s].level, side[s].by);
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
          here[l] = t % half_of(l) ? within[l] * fade : fade;
          within[l] = here[l] * later;
        }
#pragma GCC unroll 2
        for (int l = 0; l < INNER; l++) {
          if (t / half_of(l) % 2 == 0) continue;
          const int to = (t / (2 * half_of(l)) * half_of(l) + t % half_of(l)) * step;
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
    }
  }

  // The same of those who wrote: to the chunk's end, and before the levels' cuts. Where the levels'
  // are `turned`, each token has its own place, and what lies between is left as it is.
  template <bool turned>
  void pack_wrote(int block) const {
    const int first = block * BLOCK, width = K, step = turned ? LANES : width;
    const float *keys = k + first * K, *decays = decay + first * K;
    struct Part {
      bf16* to;
      vec by;
    };
    for (int j = 0; j < width; j += LANES) {
      const auto part = [&](int level, vec by) {
        return Part{place<turned>(wrote[level], turned ? first : number(level, first), j), by};
      };
      Part inner[INNER], parts[LEVELS];
      Side side[LEVELS];
      vec within[INNER + 1];
      for (int l = 0; l < INNER; l++) inner[l] = part(l, vec{});
      const int count = sides<false>(block, j, side);
      for (int s = 0; s < count; s++) parts[s] = part(side[s].level, side[s].by);
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
          behind[l] = (t + 2) % half_of(l) ? within[l] * later : splat(1.f);
          within[l] = behind[l] * fade;
        }
#pragma GCC unroll 2
        for (int l = 0; l < INNER; l++) {
          if (t / half_of(l) % 2) continue;
          const int line = turned ? t : t / (2 * half_of(l)) * half_of(l) + t % half_of(l);
          put_two<turned>(inner[l].to + line * step, step, k_1 * within[l], k_2 * behind[l]);
        }
        const vec writing_1 = k_1 * within[INNER], writing_2 = k_2 * behind[INNER];
        for (int s = 0; s < count; s++) {
          const vec by = parts[s].by;
          put_two<turned>(parts[s].to + t * step, step, writing_1 * by, writing_2 * by);
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
    const int squares_down = K / STRETCH, count = squares_down * (V / STRETCH);
    // A tile is long on its way to memory: each square is added while the next one is made.
    for (int i = 0; i <= count; i++) {
      if (i < count) {
        const int row = i % squares_down * STRETCH, column = i / squares_down * STRETCH;
        make_square({depth, a + row * depth, depth, b + column * STRETCH, V}, squares[i % 2]);
      }
      if (i == 0) continue;
      const int first = (i - 1) % squares_down * STRETCH, column = (i - 1) / squares_down * STRETCH;
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
                          right + first * V + column * STRETCH + (row - first) * LANES, to, V);
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
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + step),
                          _mm512_extracti64x4_epi64(both, 1));
    }
  }
};
#endif

}  // namespace
