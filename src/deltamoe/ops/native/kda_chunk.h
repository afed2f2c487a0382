// One chunk of one head of Kimi Delta Attention: its tokens brought near, and the pairs of its
// tokens with their gradients. kda.cpp walks over chunks; letters and derivation: docs/kda.md.
//
// A chunk is cut in blocks of 16 tokens. Between two blocks "survival by halves" splits the decay
// at a cut, so a block of pairs is one matrix product; inside a block what each token wrote is
// carried along and fades step by step. Where products are rounded the halves go on down to 4
// tokens, and all pairs of a level are one product. Nothing is ever divided by a decay, so any
// decay in [0, 1] is exact.
//
// Rows are padded with zeros to a multiple of 16 tokens and channels: a zero key writes nothing.
#pragma once

#include <cstdlib>
#include <memory>
#include <utility>

#include "products.h"

namespace {

constexpr int BLOCK = 16;
constexpr int NEAR = 4;    // tokens between which nothing is rounded
constexpr int LEVELS = 2;  // of cuts within a block, from NEAR tokens on either side

struct Tensor {  // [batch, time, head, channel], channels contiguous; bf16 or fp32
  void* data;
  int64_t batch, time, head;  // strides, in elements
  int64_t is_bf16;
};

struct Problem {
  int64_t sequences, heads, value_heads, key_dim, value_dim, chunk;
  int64_t num_threads;
  // of each sequence: where it lies, and the number of its first chunk
  const int64_t *batch_of, *start, *length, *first_chunk;
  Tensor q, k, v, log_decay, beta, out;
  const float* memory;  // [sequences, value_heads, K, V]
  float* final_memory;
  // what the backward pass needs, or null: [chunks, value_heads, ...], padded; all but `system` in
  // bf16 where products round
  void *starts, *deltas, *q_on_k;
  float* system;
};

struct Gradients {
  Tensor out;                 // given
  const float* final_memory;  // given
  Tensor q, k, v, log_decay, beta;
  float* memory;
};

// Whether the caches forget what is written of a text before anybody reads it.
bool is_long(const Problem& p) {
  constexpr int64_t LARGE = 1 << 20;  // bytes
  int64_t tokens = 0;
  for (int64_t n = 0; n < p.sequences; n++) tokens += p.length[n];
  return tokens * p.value_heads * p.value_dim * int64_t(sizeof(float)) > LARGE;
}

int padded(int64_t n) { return int((n + 15) / 16 * 16); }

// The chunk's rows: the fewest blocks that hold n tokens and can be halved down to one.
int rows_for(int64_t n) {
  int rows = BLOCK;
  while (rows < n) rows *= 2;
  return rows;
}

// One allocation, cut into pieces that begin on a line. Most are whole pages long: were they not
// set off from each other, a load would wait for stores to the same place in another piece's page.
class Scratch {
 public:
  explicit Scratch(size_t floats)
      : data_(static_cast<float*>(aligned_alloc(64, (floats + 15) / 16 * 64 + PIECES * STEP * 4)),
              &free) {}
  float* take(size_t floats) {
    float* piece = data_.get() + used_;
    used_ += (floats + 15) / 16 * 16 + STEP - 16;
    return piece;
  }

 private:
  static constexpr size_t PIECES = 48, STEP = 96;  // pieces, and floats each wastes, at most

  std::unique_ptr<float, void (*)(void*)> data_;
  size_t used_ = 0;
};

template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load_wide(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

void read_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, float* to) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) widen(static_cast<bf16*>(x.data) + at, n, to);
  else widen(static_cast<float*>(x.data) + at, n, to);
}

// A row that will be read when the next stop's turn comes.
void prefetch_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n) {
  const int64_t size = x.is_bf16 ? 2 : 4, at = b * x.batch + t * x.time + h * x.head;
  prefetch(static_cast<char*>(x.data) + at * size, n * size);
}

void write_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) narrow(from, n, static_cast<bf16*>(x.data) + at);
  else memcpy(static_cast<float*>(x.data) + at, from, n * 4);
}

// Past the caches.
void write_far_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n,
                   const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) copy_past_caches(from, n, static_cast<bf16*>(x.data) + at);
  else copy_past_caches(from, n, static_cast<float*>(x.data) + at);
}

void add_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  float* to = static_cast<float*>(x.data) + b * x.batch + t * x.time + h * x.head;
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

bool rounds_products(const Problem& p) { return p.v.is_bf16 && amx_granted(); }

// to = sign * x * y, row by row; `by` scales each row if given. All [rows, width].
void multiply(int rows, int width, const float* x, const float* y, float* to,
              const float* by = nullptr, float sign = 1.f) {
  for (int i = 0; i < rows; i++) {
    vec scale = splat(by ? sign * by[i] : sign);
    for (int j = 0; j < width; j += LANES)
      store(to + i * width + j, load(x + i * width + j) * load(y + i * width + j) * scale);
  }
}

struct Heads {  // value heads of one task, which walks its chunks with all of them
  int64_t first, end;
};

// One chunk of one head on a task's way.
struct Stop {
  int64_t chunk, batch, start, tokens, head, value_head;

  // Neighbouring heads' rows lie on the same pages of memory: all heads of a chunk, then the next
  // chunk, forward or backward. Behind the last stop is one without tokens.
  Stop(const Problem& p, int64_t sequence, Heads heads, int64_t index, bool is_forward) {
    const int64_t count = heads.end - heads.first, length = p.length[sequence];
    const int64_t chunks = (length + p.chunk - 1) / p.chunk;
    const int64_t at = is_forward ? index / count : chunks - 1 - index / count;
    chunk = p.first_chunk[sequence] + at;
    batch = p.batch_of[sequence];
    start = p.start[sequence] + at * p.chunk;
    const int64_t left = length - at * p.chunk;
    tokens = at < 0 || left < 0 ? 0 : left < p.chunk ? left : p.chunk;
    value_head = heads.first + index % count;
    head = value_head / (p.value_heads / p.heads);
  }
};

// One chunk of one head, as far as queries, keys and decays go.
struct Chunk {
  Products products;
  int C, K, V;  // rows and padded channels
  int stride;   // of the C x C matrices
  float *q, *k, *beta, *decay;
  float *prefix, *suffix;  // of the level at hand; at the end, of the whole chunk
  float *right, *left, *turned, *fading;
  float* crossed;  // of one level's readers with all who wrote
  bf16* rooms[6];  // for packed operands

  // of a room: the largest product's operand has C, K or V lines and as many terms, or twice C's
  static size_t room(int C, int K, int V) {
    const int channels = in_tiles(K > V ? K : V), tokens = in_tiles(C);
    return packed_size(channels > tokens ? channels : tokens,
                       channels > 2 * tokens ? channels : 2 * tokens);
  }

  // of a level's readers, queries and keys, with all who wrote
  static size_t crossings(int C) { return size_t(C) * (C > 2 * BLOCK ? C / 2 : BLOCK); }

  static size_t floats(int C, int K, int V) {
    return size_t(C) * (8 * K + 1) + size_t(BLOCK) * 2 * K + crossings(C) +
           6 * room(C, K, V) / 2;
  }

  Chunk(Scratch& s, int C_, int K_, int V_, Products products_)
      : products(products_), C(C_), K(K_), V(V_), stride(C_) {
    for (bf16*& one : rooms)
      one = products.rounds ? reinterpret_cast<bf16*>(s.take(room(C, K, V) / 2)) : nullptr;
    q = s.take(C * K), k = s.take(C * K), beta = s.take(C);
    decay = s.take(C * K), prefix = s.take(C * K), suffix = s.take(C * K);
    right = s.take(C * K), left = s.take(C * K), turned = s.take(C * K);
    fading = s.take(2 * BLOCK * K);
    crossed = s.take(crossings(C));
  }

  // Read a stop's tokens but for their values, and fill up with tokens that change nothing. Ask for
  // those of the stop after it.
  void stage(const Problem& p, const Stop& at, const Stop& next) {
    C = rows_for(at.tokens);
    if (at.tokens < C || p.key_dim < K) {
      memset(q, 0, sizeof(float) * C * K), memset(k, 0, sizeof(float) * C * K);
      memset(beta, 0, sizeof(float) * C), memset(decay, 0, sizeof(float) * C * K);
    }
    for (int64_t i = 0; i < C; i++) {
      if (i < at.tokens) {
        read_row(p.q, at.batch, at.start + i, at.head, p.key_dim, q + i * K);
        read_row(p.k, at.batch, at.start + i, at.head, p.key_dim, k + i * K);
        read_row(p.log_decay, at.batch, at.start + i, at.value_head, p.key_dim, decay + i * K);
        read_row(p.beta, at.batch, at.start + i, at.value_head, 1, beta + i);
      }
      if (i < next.tokens) {
        prefetch_row(p.q, next.batch, next.start + i, next.head, p.key_dim);
        prefetch_row(p.k, next.batch, next.start + i, next.head, p.key_dim);
        prefetch_row(p.v, next.batch, next.start + i, next.value_head, p.value_dim);
        prefetch_row(p.log_decay, next.batch, next.start + i, next.value_head, p.key_dim);
      }
      for (int j = 0; j < K; j += LANES)
        store(decay + i * K + j, exp_lanes(load(decay + i * K + j)));
    }
  }

  // Their rows of a tensor with V channels, filled up with zeros.
  void stage_values(const Problem& p, const Tensor& x, const Stop& at, float* to) const {
    if (at.tokens < C || p.value_dim < V) memset(to, 0, sizeof(float) * C * V);
    for (int64_t i = 0; i < at.tokens; i++)
      read_row(x, at.batch, at.start + i, at.value_head, p.value_dim, to + i * V);
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

  // What all cuts of a level have on their sides, packed: the readers' queries and keys, times beta
  // and the prefix, and the keys of those who wrote, times the suffix. Forward they are rows;
  // backward they stand right of a product.
  struct Sides {
    bf16 *readers, *wrote;
  };
  Sides packed(int level) const { return {rooms[2 * level + 2], rooms[2 * level + 3]}; }

  void pack_halves(int half, Sides to) {
    const int n = C / 2, width = in_tiles(K);
    for (int first = 0, row = 0; first < C; first += 2 * half, row += half) {
      const int at = (first + half) * K;
      pack_product(half, K, q + at, prefix + at, nullptr, 1.f, to.readers + row * width);
      pack_product(half, K, k + at, prefix + at, beta + first + half, 1.f,
                   to.readers + (n + row) * width);
      pack_product(half, K, k + first * K, suffix + first * K, nullptr, 1.f,
                   to.wrote + row * width);
    }
  }

  // Goes once through a block, 16 channels at a time, and makes its products: the whole block's are
  // stored; those of the levels within it are only shown. reads(level, i, token, channel, prefix)
  // and then wrote(level, i, token, channel, suffix), where i counts a level's readers, or writers,
  // from the chunk's start. Tokens come in order to `reads`, and in reverse order to `wrote`.
  template <class Reads, class Wrote>
  void sweep_block(int first, Reads reads, Wrote wrote) {
    constexpr int SIZES[LEVELS + 1] = {NEAR, 2 * NEAR, BLOCK};
    const auto number = [&](int half, int t) {
      return first / 2 + t / (2 * half) * half + t % half;
    };
    for (int j = 0; j < K; j += LANES) {
      vec within[LEVELS + 1];
#pragma GCC unroll 16
      for (int t = 0; t < BLOCK; t++) {
        const vec fade = load(decay + (first + t) * K + j);
#pragma GCC unroll 3
        for (int l = 0; l <= LEVELS; l++) {
          const int size = SIZES[l];
          within[l] = t % size ? within[l] * fade : fade;
          if (l < LEVELS && t / size % 2) reads(l, number(size, t), first + t, j, within[l]);
        }
        store(prefix + (first + t) * K + j, within[LEVELS]);
      }
#pragma GCC unroll 16
      for (int t = BLOCK - 1; t >= 0; t--) {
        const vec later = t + 1 < BLOCK ? load(decay + (first + t + 1) * K + j) : splat(1.f);
#pragma GCC unroll 3
        for (int l = 0; l <= LEVELS; l++) {
          const int size = SIZES[l];
          within[l] = (t + 1) % size ? within[l] * later : splat(1.f);
          if (l < LEVELS && t / size % 2 == 0) wrote(l, number(size, t), first + t, j, within[l]);
        }
        store(suffix + (first + t) * K + j, within[LEVELS]);
      }
    }
  }

  // The levels within a block, packed as pack_halves packs the others.
  void pack_block(int first) {
    const int n = C / 2, width = in_tiles(K);
    if (width > K)
      for (int level = 0; level < LEVELS; level++) {
        const Sides to = packed(level);
        memset(to.wrote + first / 2 * width, 0, sizeof(bf16) * BLOCK / 2 * width);
        for (int i : {0, n})
          memset(to.readers + (i + first / 2) * width, 0, sizeof(bf16) * BLOCK / 2 * width);
      }
    sweep_block(
        first,
        [&](int level, int i, int token, int j, vec by) {
          const int at = token * K + j;
          bf16* to = packed(level).readers + i * width + j;
          store_narrow(to, load(q + at) * by);
          store_narrow(to + n * width, load(k + at) * by * splat(beta[token]));
        },
        [&](int level, int i, int token, int j, vec by) {
          store_narrow(packed(level).wrote + i * width + j, load(k + token * K + j) * by);
        });
  }

  // What row i reads of column j <= i with its query (q_on_k, zero above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1.
  // Leaves the whole chunk's products in prefix and suffix.
  void pairs(float* q_on_k, float* system) {
    memset(q_on_k, 0, sizeof(float) * C * stride);
    for (int first = 0; first < C; first += BLOCK) {
      if (products.rounds) {
        for (int near = 0; near < BLOCK; near += NEAR) near_pairs(first + near, q_on_k, system);
        pack_block(first);
      } else {
        diagonal_block(first, q_on_k, system);
        products_within(BLOCK, first);
      }
    }
    if (products.rounds)
      for (int level = 0; level < LEVELS; level++)
        rounded_pairs(NEAR << level, packed(level), q_on_k, system);
    for (int half = BLOCK; half < C; half *= 2) {
      if (products.rounds) {
        pack_halves(half, packed(0));
        rounded_pairs(half, packed(0), q_on_k, system);
      } else {
        halves_pairs(half, q_on_k, system);
      }
      double_products(half);
    }
    for (int first = 0; first < C; first += BLOCK)
      invert_block(system + ptrdiff_t(first) * stride + first);
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

  // The same in one product for all cuts: a row for each reader's query, then for each one's key, a
  // column for each who wrote. Of it only what belongs to one cut is used.
  void rounded_pairs(int half, Sides sides, float* q_on_k, float* system) {
    const int n = C / 2, columns = n < BLOCK ? BLOCK : n, width = in_tiles(K);
    pack_turned(columns, K, sides.wrote, rooms[1]);
    gemm_packed<false>(2 * n, columns, width, sides.readers, width, rooms[1], columns, crossed,
                       columns);
    for (int i = 0; i < n; i++) {
      const float *by_q = crossed + i * columns + i / half * half, *by_k = by_q + n * columns;
      const ptrdiff_t at = pair_of(i, half);
      for (int j = 0; j < half; j += NEAR) {
        memcpy(q_on_k + at + j, by_q + j, sizeof(float) * NEAR);
        memcpy(system + at + j, by_k + j, sizeof(float) * NEAR);
      }
    }
  }

  // Where the pairs of a level's i-th reader begin in a matrix of pairs.
  ptrdiff_t pair_of(int i, int half) const {
    const int first = i / half * 2 * half;
    return ptrdiff_t(first + half + i % half) * stride + first;
  }

  // All pairs of NEAR tokens in fp32.
  void near_pairs(int first, float* q_on_k, float* L) {
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
      ptrdiff_t at = ptrdiff_t(first + t) * stride + first;
      for (int s = 0; s <= t; s++) q_on_k[at + s] = sum(by_q[t][s]);
      for (int s = 0; s < t; s++) L[at + s] = sum(by_k[t][s]) * beta[first + t];
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

  // A block of L, below the diagonal, becomes (I + L)^-1.
  void invert_block(float* L) {
    float inverse[BLOCK][BLOCK] = {};
    for (int t = 0; t < BLOCK; t++) {
      for (int s = 0; s < t; s++)
        for (int j = 0; j < BLOCK; j++) inverse[t][j] -= L[t * stride + s] * inverse[s][j];
      inverse[t][t] = 1.f;
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

  // Gradients of the pairs: to q and beta k as rows, to k as columns, all added to.
  struct Sums {
    float *row_q, *row_k, *column_k;
  };
  void pairs_backward(const float* d_q_on_k, const float* d_L, Sums sums) {
    if (products.rounds)
      for (int level = 0; level < LEVELS; level++) zero_rest(packed(level));
    for (int first = 0; first < C; first += BLOCK) {
      if (products.rounds) {
        for (int near = first; near < first + BLOCK; near += NEAR)
          near_backward(near, d_q_on_k, d_L, sums);
        pack_block_right(first);
      } else {
        diagonal_backward(first, d_q_on_k, d_L, sums);
        products_within(BLOCK, first);
      }
    }
    if (products.rounds)
      for (int level = 0; level < LEVELS; level++)
        rounded_backward(NEAR << level, packed(level), factors(level), factors(level), d_q_on_k,
                         d_L, sums);
    for (int half = BLOCK; half < C; half *= 2) {
      if (products.rounds) {
        const int n = C / 2, readers = half * K;
        pack_product_right(K, n, half, k, suffix, packed(0).wrote);
        pack_products_right(K, n, half, q + readers, k + readers, prefix + readers, beta + half,
                            packed(0).readers);
        rounded_backward(half, packed(0), prefix, suffix, d_q_on_k, d_L, sums);
      } else {
        halves_backward(half, d_q_on_k, d_L, sums);
      }
      double_products(half);
    }
  }

  // Of a level within blocks, each token's prefix or suffix.
  float* factors(int level) const { return level ? left : right; }

  // A block's part of the right operands of the levels within it.
  void pack_block_right(int first) {
    vec before_q[LEVELS], before_k[LEVELS], behind[LEVELS];
    const int n = C / 2;
    sweep_block(
        first,
        [&](int level, int i, int token, int j, vec by) {
          const int at = token * K + j;
          const vec query = load(q + at) * by, key = load(k + at) * by * splat(beta[token]);
          store(factors(level) + at, by);
          if (i % 2) {
            pack_pair(K, i - 1, j, before_q[level], query, packed(level).readers);
            pack_pair(K, n + i - 1, j, before_k[level], key, packed(level).readers);
          } else {
            before_q[level] = query, before_k[level] = key;
          }
        },
        [&](int level, int i, int token, int j, vec by) {
          const int at = token * K + j;
          const vec key = load(k + at) * by;
          store(factors(level) + at, by);
          if (i % 2) behind[level] = key;
          else pack_pair(K, i, j, key, behind[level], packed(level).wrote);
        });
  }

  // The terms with which a short chunk's operands are filled up.
  void zero_rest(Sides of) const {
    const int n = C / 2;
    if (n % 32) memset(of.wrote, 0, sizeof(bf16) * in_tiles(n) * K);
    if (C % 32) memset(of.readers, 0, sizeof(bf16) * in_tiles(C) * K);
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

  // The same for all cuts at once, in the rows and columns of rounded_pairs; what is not of one cut
  // is worth 0.
  void rounded_backward(int half, Sides sides, const float* by_readers, const float* by_wrote,
                        const float* d_q_on_k, const float* d_L, Sums sums) {
    const int n = C / 2, columns = n < BLOCK ? BLOCK : n;
    memset(crossed, 0, sizeof(float) * C * columns);
    for (int i = 0; i < n; i++) {
      float* by_q = crossed + i * columns + i / half * half;
      for (int j = 0; j < half; j += NEAR) {
        memcpy(by_q + j, d_q_on_k + pair_of(i, half) + j, sizeof(float) * NEAR);
        memcpy(by_q + n * columns + j, d_L + pair_of(i, half) + j, sizeof(float) * NEAR);
      }
    }
    pack_left(C, columns, {crossed, columns, 1}, 1.f, rooms[1]);
    pack_left(columns, C, {crossed, 1, columns}, 1.f, rooms[0]);
    gemm_packed_blocks(C, K, in_tiles(n), rooms[1], in_tiles(n), sides.wrote, K, [&](auto... x) {
      add_to_rows(x..., by_readers, [&](int i) {
        const int reader = i < n ? i : i - n;
        return std::make_pair(i < n ? sums.row_q : sums.row_k, reader + (reader & -half) + half);
      });
    });
    const int terms = in_tiles(C);
    gemm_packed_blocks(columns, K, terms, rooms[0], terms, sides.readers, K, [&](auto... x) {
      add_to_rows(x..., by_wrote, [&](int i) {
        return std::make_pair(i < n ? sums.column_k : nullptr, i + (i & -half));
      });
    });
  }

  // A block's rows, times those of `by`, to where `place` says: which array, and which of its rows.
  template <class Place>
  void add_to_rows(int row, int column, int rows, int columns, const float* x, ptrdiff_t ldx,
                   const float* by, Place place) {
    for (int i = 0; i < rows; i++, x += ldx) {
      const auto [array, at] = place(row + i);
      if (!array) return;
      for (int j = 0; j < columns; j += LANES) {
        float* to = array + at * K + column + j;
        store(to, load(to) + load(x + j) * load(by + at * K + column + j));
      }
    }
  }

  // Rows x * y (times sign, and by row), as a product's left operand.
  Left scaled(const float* x, const float* y, const float* by, float sign, float* wide,
              bf16* room) const {
    if (products.rounds) pack_product(C, K, x, y, by, sign, room);
    else multiply(C, K, x, y, wide, by, sign);
    return {{wide, K, 1}, room, in_tiles(K)};
  }

  // The same with the rows as terms: from `first` on of `width`.
  Left scaled_terms(const float* x, const float* y, const float* by, float sign, float* wide,
                    bf16* room, int first = 0, int width = 0) const {
    width = width ? width : in_tiles(C);
    if (products.rounds) pack_product_turned(K, C, x, y, by, sign, room + first, width);
    else multiply(C, K, x, y, wide + first * K, by, sign);
    return {{wide, 1, K}, room, width};
  }

  // Rows that a product of a triangle takes at once: tiles come in pairs.
  int step() const { return products.rounds && C > BLOCK ? 2 * BLOCK : BLOCK; }

  void add_scaled(int rows, const float* x, const float* by, float* to) {
    for (int i = 0; i < rows * K; i += LANES)
      store(to + i, load(to + i) + load(x + i) * load(by + i));
  }

  // Those of NEAR tokens' pairs, in fp32.
  void near_backward(int first, const float* d_q_on_k, const float* d_L, Sums sums) {
    const auto [row_q, row_k, column_k] = sums;
    const ptrdiff_t corner = ptrdiff_t(first) * stride + first;
    const float *d_reads = d_q_on_k + corner, *d_recalls = d_L + corner;
    for (int j = first * K; j < (first + 1) * K; j += LANES) {
      vec wrote[NEAR], worth[NEAR] = {};
#pragma GCC unroll 4
      for (int t = 0; t < NEAR; t++) {
        const int at = j + t * K;
        const vec fade = load(decay + at);
        wrote[t] = load(k + at);
        vec to_q = load(row_q + at) + wrote[t] * splat(d_reads[t * stride + t]);
        vec to_k = load(row_k + at);
#pragma GCC unroll 4
        for (int s = 0; s < t; s++) {
          wrote[s] *= fade;
          to_q += wrote[s] * splat(d_reads[t * stride + s]);
          to_k += wrote[s] * splat(d_recalls[t * stride + s]);
        }
        store(row_q + at, to_q);
        store(row_k + at, to_k);
      }
#pragma GCC unroll 4
      for (int t = NEAR - 1; t >= 0; t--) {
        const int at = j + t * K;
        const vec fade = load(decay + at), query = load(q + at);
        const vec key = load(k + at) * splat(beta[first + t]);
        store(column_k + at,
              load(column_k + at) + worth[t] + query * splat(d_reads[t * stride + t]));
#pragma GCC unroll 4
        for (int s = 0; s < t; s++)
          worth[s] = (worth[s] + query * splat(d_reads[t * stride + s]) +
                      key * splat(d_recalls[t * stride + s])) * fade;
      }
    }
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

}  // namespace
