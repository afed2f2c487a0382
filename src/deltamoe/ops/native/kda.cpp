// Kimi Delta Attention over chunks: forward, and the backward pass written by hand.
//
// One task is one sequence and a few query/key heads with their value heads; a task walks its
// chunks in order with everything it needs in this core's cache. No head's numbers depend on how
// many there are in its task, so results do not depend on the number of threads. Letters and
// derivation: docs/kda.md. A chunk is cut in blocks of 16 tokens. Between two blocks "survival by
// halves" splits the decay at a cut, so a block of pairs is one matrix product; inside a block
// what each token wrote is carried along and fades step by step. Nothing is ever divided by a
// decay, so any decay in [0, 1] is exact.
//
// Products are in fp32. If the values came in bf16 and the machine has AMX, all but the triangular
// solve round their operands to bf16 and sum in fp32; forward, the halves then go on down to 4
// tokens. What is an operand twice is packed once.
//
// Rows are padded with zeros to a multiple of 16 tokens and channels: a zero key writes nothing.

#include <cmath>
#include <cstdlib>
#include <memory>

#include "gemm_bf16.h"

namespace {

constexpr int BLOCK = 16;
constexpr int NEAR = 4;  // tokens between which nothing is rounded

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
  // what the backward pass needs, or null: [chunks, value_heads, ...], padded
  float *starts, *deltas, *q_on_k, *system;
};

struct Gradients {
  Tensor out;                 // given
  const float* final_memory;  // given
  Tensor q, k, v, log_decay, beta;
  float* memory;
};

int padded(int64_t n) { return int((n + 15) / 16 * 16); }

// The chunk's rows: the fewest blocks that hold n tokens and can be halved down to one.
int rows_for(int64_t n) {
  int rows = BLOCK;
  while (rows < n) rows *= 2;
  return rows;
}

class Scratch {  // one allocation, cut into 64-byte-aligned pieces
 public:
  explicit Scratch(size_t floats)
      : data_(static_cast<float*>(aligned_alloc(64, (floats * 4 + 63) / 64 * 64)), &free) {}
  float* take(size_t floats) {
    float* piece = data_.get() + used_;
    used_ += (floats + 15) / 16 * 16;
    return piece;
  }

 private:
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

// A row that will be read when the next chunk's turn comes.
void prefetch_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n) {
  const int64_t size = x.is_bf16 ? 2 : 4, at = b * x.batch + t * x.time + h * x.head;
  prefetch(static_cast<char*>(x.data) + at * size, n * size);
}

void narrow(const float* from, int64_t n, bf16* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_narrow(to + i, load(from + i));
  for (; i < n; i++) to[i] = from_float<bf16>(from[i]);
}

void write_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16)
    narrow(from, n, static_cast<bf16*>(x.data) + at);
  else
    memcpy(static_cast<float*>(x.data) + at, from, n * 4);
}

void add_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  float* to = static_cast<float*>(x.data) + b * x.batch + t * x.time + h * x.head;
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// What stands left and right of a product: as it lies in fp32, and packed if it is to be rounded.
struct Left {
  Strided wide;
  const bf16* packed;
  int width;  // terms of a packed row
  Left from(int row) const {
    return {{wide.p + row * wide.row, wide.row, wide.column}, packed + row * width, width};
  }
};
struct Right {
  const float* wide;
  ptrdiff_t row;
  const bf16* packed;
  int columns;
  Right from(int term) const {  // a multiple of 32 where it is packed
    return {wide + term * row, row, packed + term * columns, columns};
  }
};

int in_tiles(int terms) { return (terms + 31) / 32 * 32; }

// Products in fp32, or in bf16 where that is wanted and faster. What `room` was given to holds its
// packed form as long as it is needed; for fp32 it is null.
struct Products {
  bool rounds;

  Left left(int M, int K, Strided a, bf16* room) const {
    if (rounds) pack_left(M, K, a, 1.f, room);
    return {a, room, in_tiles(K)};
  }

  Right right(int K, int N, const float* b, bf16* room) const {
    if (rounds) pack_right(N, K, b, N, room);
    return {b, N, room, N};
  }

  // The right operand [K, N] that is `rows` [N, K] transposed.
  Right turned(int K, int N, const float* rows, float* wide, bf16* room, bf16* between) const {
    if (rounds) {
      pack_left(N, K, {rows, K, 1}, 1.f, between);
      pack_turned(N, K, between, room);
    } else {
      transpose(N, K, rows, K, wide, N);
    }
    return {wide, N, room, N};
  }

  template <Into into>
  void run(int M, int N, int K, Left a, Right b, float* c, ptrdiff_t ldc,
           const float* scale = nullptr) const {
    static_assert(into != Into::SUB, "tiles only add");
    if (!rounds) return gemm<into>(M, N, K, a.wide, b.wide, b.row, c, ldc, scale);
    if (into == Into::SCALE_ADD)
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n += LANES)
          store(c + m * ldc + n, load(c + m * ldc + n) * splat(scale[m]));
    gemm_packed<into != Into::SET>(M, N, in_tiles(K), a.packed, a.width, b.packed, b.columns, c,
                                   ldc);
  }
};

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

// One chunk of one head, as far as queries, keys and decays go.
struct Chunk {
  Products products;
  int C, K, V;  // rows and padded channels
  int stride;   // of the C x C matrices
  float *q, *k, *v, *beta, *decay;
  float *prefix, *suffix;  // of the level at hand; at the end, of the whole chunk
  float *right, *left, *turned, *fading;
  bf16* rooms[5];  // for packed operands

  // of a room: the largest product's operand has C, K or V lines and as many terms
  static size_t room(int C, int K, int V) {
    int largest = C > K ? (C > V ? C : V) : (K > V ? K : V);
    return packed_size(in_tiles(largest), largest);
  }

  static size_t floats(int C, int K, int V) {
    return size_t(C) * (6 * K + V + 1) + 4 * size_t(C) * K + size_t(BLOCK) * 2 * K +
           5 * room(C, K, V) / 2 + 16 * 24;
  }

  Chunk(Scratch& s, int C_, int K_, int V_, bool rounds)
      : products{rounds}, C(C_), K(K_), V(V_), stride(C_) {
    for (bf16*& one : rooms)
      one = rounds ? reinterpret_cast<bf16*>(s.take(room(C, K, V) / 2)) : nullptr;
    q = s.take(C * K), k = s.take(C * K), v = s.take(C * V), beta = s.take(C);
    decay = s.take(C * K), prefix = s.take(C * K), suffix = s.take(C * K);
    right = s.take(C * K), left = s.take(C * K), turned = s.take(C * K);
    fading = s.take(2 * BLOCK * K);
  }

  // Read n tokens from `t` on and fill up with tokens that change nothing. `num_next` tokens from
  // `next` on will be the next chunk.
  void stage(const Problem& p, int64_t b, int64_t t, int64_t n, int64_t next, int64_t num_next,
             int64_t h, int64_t hv) {
    C = rows_for(n);
    if (n < C || p.key_dim < K || p.value_dim < V) {
      memset(q, 0, sizeof(float) * C * K), memset(k, 0, sizeof(float) * C * K);
      memset(v, 0, sizeof(float) * C * V), memset(beta, 0, sizeof(float) * C);
      memset(decay, 0, sizeof(float) * C * K);
    }
    for (int64_t i = 0; i < n; i++) {
      read_row(p.q, b, t + i, h, p.key_dim, q + i * K);
      read_row(p.k, b, t + i, h, p.key_dim, k + i * K);
      read_row(p.v, b, t + i, hv, p.value_dim, v + i * V);
      read_row(p.log_decay, b, t + i, hv, p.key_dim, decay + i * K);
      read_row(p.beta, b, t + i, hv, 1, beta + i);
      if (i < num_next) {
        prefetch_row(p.q, b, next + i, h, p.key_dim), prefetch_row(p.k, b, next + i, h, p.key_dim);
        prefetch_row(p.v, b, next + i, hv, p.value_dim);
        prefetch_row(p.log_decay, b, next + i, hv, p.key_dim);
      }
    }
    for (int i = 0; i < C * K; i += LANES) store(decay + i, exp_lanes(load(decay + i)));
  }

  // Products from the chunk's start through each token, and from behind it to the chunk's end.
  void whole_products() {
    memcpy(prefix, decay, sizeof(float) * K);
    for (int i = 1; i < C; i++)
      for (int j = 0; j < K; j++) prefix[i * K + j] = prefix[(i - 1) * K + j] * decay[i * K + j];
    for (int j = 0; j < K; j++) suffix[(C - 1) * K + j] = 1.f;
    for (int i = C - 2; i >= 0; i--)
      for (int j = 0; j < K; j++)
        suffix[i * K + j] = suffix[(i + 1) * K + j] * decay[(i + 1) * K + j];
  }

  // The same within blocks of `size` tokens: the first level.
  void block_products(int size) {
    for (int first = 0; first < C; first += size) {
      float *p = prefix + first * K, *s = suffix + first * K, *d = decay + first * K;
      memcpy(p, d, sizeof(float) * K);
      for (int i = 1; i < size; i++)
        for (int j = 0; j < K; j++) p[i * K + j] = p[(i - 1) * K + j] * d[i * K + j];
      for (int j = 0; j < K; j++) s[(size - 1) * K + j] = 1.f;
      for (int i = size - 2; i >= 0; i--)
        for (int j = 0; j < K; j++) s[i * K + j] = s[(i + 1) * K + j] * d[(i + 1) * K + j];
    }
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

  // The same two sides packed on the way; beta k stands `below` rows below q.
  void pack_halves(int first, int half, int below, bf16* readers, bf16* wrote) {
    int at = (first + half) * K;
    pack_product(half, K, q + at, prefix + at, nullptr, 1.f, readers);
    pack_product(half, K, k + at, prefix + at, beta + first + half, 1.f,
                 readers + below * in_tiles(K));
    pack_product(half, K, k + first * K, suffix + first * K, nullptr, 1.f, wrote);
  }

  // What row i reads of column j <= i with its query (q_on_k, zero above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1.
  // Leaves the whole chunk's products in prefix and suffix.
  void pairs(float* q_on_k, float* system) {
    memset(q_on_k, 0, sizeof(float) * C * stride);
    if (products.rounds) {
      for (int first = 0; first < C; first += NEAR) near_pairs(first, q_on_k, system);
      block_products(NEAR);
      for (int half = NEAR; half < BLOCK; half *= 2) {
        for (int first = 0; first < C; first += BLOCK) pairs_in_block(first, half, q_on_k, system);
        double_products(half);
      }
    } else {
      for (int first = 0; first < C; first += BLOCK) diagonal_block(first, q_on_k, system);
      block_products(BLOCK);
    }
    for (int first = 0; first < C; first += BLOCK)
      invert_block(system + ptrdiff_t(first) * stride + first);
    for (int half = BLOCK; half < C; half *= 2) {
      for (int first = 0; first < C; first += 2 * half) {
        Left readers{{right, K, 1}, rooms[0], in_tiles(K)};
        Right wrote{turned, half, rooms[1], half};
        if (products.rounds) {
          pack_halves(first, half, half, rooms[0], rooms[2]);
          pack_turned(half, K, rooms[2], rooms[1]);
        } else {
          scale_halves(first, half);
          transpose(half, K, left, K, turned, half);
        }
        ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
        products.run<Into::SET>(half, half, K, readers, wrote, q_on_k + at, stride);
        products.run<Into::SET>(half, half, K, readers.from(half), wrote, system + at, stride);
      }
      double_products(half);
    }
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

  // A block's pairs across the cuts of one level, all in one product of 16 rows and columns; the
  // pairs that belong to different cuts are left out.
  void pairs_in_block(int first, int half, float* q_on_k, float* L) {
    alignas(64) float reads[BLOCK * BLOCK];
    const int width = in_tiles(K), cuts = BLOCK / 2 / half;
    for (int cut = 0; cut < cuts; cut++)
      pack_halves(first + 2 * half * cut, half, BLOCK / 2, rooms[0] + half * cut * width,
                  rooms[2] + half * cut * width);
    pack_turned(BLOCK, K, rooms[2], rooms[1]);
    gemm_packed<false>(BLOCK, BLOCK, width, rooms[0], width, rooms[1], BLOCK, reads, BLOCK);
    for (int r = 0; r < BLOCK / 2; r++) {
      const int column = r / half * half;  // of the product
      const int left = first + 2 * column, row = left + half + r % half;
      const ptrdiff_t at = ptrdiff_t(row) * stride + left;
      const float *by_q = reads + r * BLOCK + column, *by_k = by_q + BLOCK / 2 * BLOCK;
      for (int j = 0; j < half; j += NEAR) {
        memcpy(q_on_k + at + j, by_q + j, sizeof(float) * NEAR);
        memcpy(L + at + j, by_k + j, sizeof(float) * NEAR);
      }
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
  void pairs_backward(const float* d_q_on_k, const float* d_L, float* row_q, float* row_k,
                      float* column_k) {
    for (int first = 0; first < C; first += BLOCK)
      diagonal_backward(first, d_q_on_k, d_L, row_q, row_k, column_k);
    block_products(BLOCK);
    for (int half = BLOCK; half < C; half *= 2) {
      for (int first = 0; first < C; first += 2 * half) {
        scale_halves(first, half);
        const Right wrote = products.right(half, K, left, rooms[0]);
        const Right q_read = products.right(half, K, right, rooms[1]);
        const Right k_read = products.right(half, K, right + half * K, rooms[2]);
        const auto worth = [&](const float* d, bool is_turned) {
          const Strided pairs{d, is_turned ? 1 : stride, is_turned ? stride : 1};
          return products.left(half, half, pairs, rooms[3]);
        };
        ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
        int rows = (first + half) * K, columns = first * K;
        products.run<Into::SET>(half, K, half, worth(d_q_on_k + at, false), wrote, turned, K);
        add_scaled(half, turned, prefix + rows, row_q + rows);
        products.run<Into::SET>(half, K, half, worth(d_L + at, false), wrote, turned, K);
        add_scaled(half, turned, prefix + rows, row_k + rows);
        products.run<Into::SET>(half, K, half, worth(d_q_on_k + at, true), q_read, turned, K);
        products.run<Into::ADD>(half, K, half, worth(d_L + at, true), k_read, turned, K);
        add_scaled(half, turned, suffix + columns, column_k + columns);
      }
      double_products(half);
    }
  }

  // Rows x * y (times sign, and by row), as a product's left operand.
  Left scaled(const float* x, const float* y, const float* by, float sign, float* wide,
              bf16* room) const {
    if (products.rounds) pack_product(C, K, x, y, by, sign, room);
    else multiply(C, K, x, y, wide, by, sign);
    return {{wide, K, 1}, room, in_tiles(K)};
  }

  // Rows that a product of a triangle takes at once: tiles come in pairs.
  int step() const { return products.rounds && C > BLOCK ? 2 * BLOCK : BLOCK; }

  void add_scaled(int rows, const float* x, const float* by, float* to) {
    for (int i = 0; i < rows * K; i += LANES)
      store(to + i, load(to + i) + load(x + i) * load(by + i));
  }

  void diagonal_backward(int first, const float* d_q_on_k, const float* d_L, float* row_q,
                         float* row_k, float* column_k) {
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

struct Saved {  // one chunk's share of what forward leaves for backward
  float *start, *delta, *q_on_k, *system;
  Saved(const Problem& p, int64_t chunk, int64_t head) {
    int64_t K = padded(p.key_dim), V = padded(p.value_dim), C = p.chunk;
    int64_t at = chunk * p.value_heads + head;
    start = p.starts + at * K * V;
    delta = p.deltas + at * C * V;
    q_on_k = p.q_on_k + at * C * C;
    system = p.system + at * C * C;
  }
};

void read_memory(const float* from, int64_t rows, int64_t columns, int width, int height,
                 float* to) {
  memset(to, 0, sizeof(float) * width * height);
  for (int64_t i = 0; i < rows; i++) memcpy(to + i * width, from + i * columns, columns * 4);
}

struct Heads {  // value heads of one task, which walks its chunks with all of them
  int64_t first, end;
};

void forward_heads(const Problem& p, int64_t n, Heads heads, Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, rounds);
  const Products& products = c.products;
  float* memories = scratch.take(size_t(heads.end - heads.first) * K * V);
  float* own_delta = scratch.take(size_t(stride) * V);
  float* out = scratch.take(size_t(stride) * V);
  float* own_q_on_k = scratch.take(size_t(stride) * stride);
  float* own_system = scratch.take(size_t(stride) * stride);
  float* scaled = scratch.take(size_t(stride) * K);
  const int64_t group = p.value_heads / p.heads, b = p.batch_of[n];
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads;
  const auto memory_of = [&](int64_t hv) { return memories + (hv - heads.first) * K * V; };
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    read_memory(p.memory + (at + hv) * size, p.key_dim, p.value_dim, V, K, memory_of(hv));

  const auto walk = [&](int64_t done, int64_t hv) {
    const int64_t i = p.first_chunk[n] + done / p.chunk, h = hv / group;
    float* M = memory_of(hv);
    int64_t tokens = p.length[n] - done < p.chunk ? p.length[n] - done : p.chunk;
    int64_t t = p.start[n] + done;
    float *delta = own_delta, *q_on_k = own_q_on_k, *system = own_system;
    if (p.starts) {
      Saved saved(p, i, hv);
      delta = saved.delta, q_on_k = saved.q_on_k, system = saved.system;
      memcpy(saved.start, M, sizeof(float) * K * V);
    }
    const int64_t to_come = p.length[n] - done - tokens;
    c.stage(p, b, t, tokens, t + tokens, to_come < p.chunk ? to_come : p.chunk, h, hv);
    c.pairs(q_on_k, system);
    const int C = c.C;
    const Right start = products.right(K, V, M, c.rooms[0]);

    for (int row = 0; row < C; row++)
      for (int j = 0; j < V; j += LANES)
        store(delta + row * V + j, load(c.v + row * V + j) * splat(c.beta[row]));
    const Left recalls = c.scaled(c.k, c.prefix, c.beta, -1.f, scaled, c.rooms[1]);
    products.run<Into::ADD>(C, V, K, recalls, start, delta, V);
    c.solve(system, delta);

    const Left asks = c.scaled(c.q, c.prefix, nullptr, 1.f, scaled, c.rooms[1]);
    products.run<Into::SET>(C, V, K, asks, start, out, V);
    const Right written = products.right(C, V, delta, c.rooms[2]);
    const Left reads = products.left(C, C, {q_on_k, stride, 1}, c.rooms[1]);
    for (int first = 0; first < C; first += c.step())
      products.run<Into::ADD>(c.step(), V, first + c.step(), reads.from(first), written,
                              out + first * V, V);
    for (int64_t row = 0; row < tokens; row++)
      write_row(p.out, b, t + row, hv, p.value_dim, out + row * V);

    multiply(C, K, c.k, c.suffix, scaled);
    products.run<Into::SCALE_ADD>(K, V, C, products.left(K, C, {scaled, 1, K}, c.rooms[1]), written,
                                  M, V, c.prefix + (C - 1) * K);
  };
  // Neighbouring heads' rows lie on the same pages of memory.
  for (int64_t done = 0; done < p.length[n]; done += p.chunk)
    for (int64_t hv = heads.first; hv < heads.end; hv++) walk(done, hv);
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    for (int64_t row = 0; row < p.key_dim; row++)
      memcpy(p.final_memory + (at + hv) * size + row * p.value_dim, memory_of(hv) + row * V,
             p.value_dim * 4);
}

void backward_heads(const Problem& p, const Gradients& d, int64_t n, Heads heads,
                    Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, rounds);
  const Products& products = c.products;
  float* memories = scratch.take(size_t(heads.end - heads.first) * K * V);  // their gradients
  float* turned = scratch.take(size_t(K) * V);
  float* d_out = scratch.take(size_t(stride) * V);
  float* residual = scratch.take(size_t(stride) * V);  // its gradient
  float* delta_turned = scratch.take(size_t(stride) * V);
  float* d_q_on_k = scratch.take(size_t(stride) * stride);
  float* d_L = scratch.take(size_t(stride) * stride);
  float* scaled = scratch.take(size_t(stride) * K);
  float* d_q = scratch.take(size_t(stride) * K);
  float* reads = scratch.take(size_t(stride) * K);
  float* writes = scratch.take(size_t(stride) * K);
  float* d_G = scratch.take(size_t(stride) * K);
  float* d_v = scratch.take(V);
  float* d_chunk = scratch.take(K);
  const int64_t group = p.value_heads / p.heads, b = p.batch_of[n];
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads;
  const auto memory_of = [&](int64_t hv) { return memories + (hv - heads.first) * K * V; };
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    read_memory(d.final_memory + (at + hv) * size, p.key_dim, p.value_dim, V, K, memory_of(hv));

  const auto walk = [&](int64_t i, int64_t hv) {
    const int64_t h = hv / group;
    float* dM = memory_of(hv);
    Saved saved(p, p.first_chunk[n] + i, hv);
    int64_t done = i * p.chunk, t = p.start[n] + done;
    int64_t tokens = p.length[n] - done < p.chunk ? p.length[n] - done : p.chunk;
    c.stage(p, b, t, tokens, t - p.chunk, i ? p.chunk : 0, h, hv);
    c.whole_products();
    const int C = c.C;
    memset(d_out, 0, sizeof(float) * C * V);
    for (int64_t row = 0; row < tokens; row++) {
      read_row(d.out, b, t + row, hv, p.value_dim, d_out + row * V);
      if (i) prefetch_row(d.out, b, t - p.chunk + row, hv, p.value_dim);
    }

    // What each delta is worth, then each residual (beta v - beta k M).
    const Right out_right = products.right(C, V, d_out, c.rooms[0]);
    for (int first = 0; first < C; first += c.step()) {
      const Strided readers{saved.q_on_k + ptrdiff_t(first) * stride + first, 1, stride};
      products.run<Into::SET>(c.step(), V, C - first,
                              products.left(c.step(), C - first, readers, c.rooms[1]),
                              out_right.from(first), residual + first * V, V);
    }
    products.run<Into::ADD>(C, V, K, c.scaled(c.k, c.suffix, nullptr, 1.f, scaled, c.rooms[1]),
                            products.right(K, V, dM, c.rooms[2]), residual, V);
    c.solve_transposed(saved.system, residual);

    // Through the pairs' two matrices.
    const Left out_left = products.left(C, V, {d_out, V, 1}, c.rooms[1]);
    const Left residual_left = products.left(C, V, {residual, V, 1}, c.rooms[2]);
    const Right written = products.turned(V, C, saved.delta, delta_turned, c.rooms[3], c.rooms[4]);
    for (int first = 0; first < C; first += c.step()) {
      float* rows_q = d_q_on_k + ptrdiff_t(first) * stride;
      float* rows_L = d_L + ptrdiff_t(first) * stride;
      const int rows = c.step(), columns = first + rows;
      products.run<Into::SET>(rows, columns, V, out_left.from(first), written, rows_q, stride);
      products.run<Into::SET>(rows, columns, V, residual_left.from(first), written, rows_L, stride);
      for (int row = 0; row < rows; row++)
        for (int j = 0; j < columns; j++)
          rows_L[row * stride + j] = j < first + row ? -rows_L[row * stride + j] : 0.f;
    }

    // Through the memory at the chunk's start and the one at its end.
    const Right start = products.turned(V, K, saved.start, turned, c.rooms[3], c.rooms[4]);
    products.run<Into::SET>(C, K, V, out_left, start, d_q, K);
    products.run<Into::SET>(C, K, V, residual_left, start, reads, K);
    const Right end = products.turned(V, K, dM, turned, c.rooms[3], c.rooms[4]);
    const Left written_left = products.left(C, V, {saved.delta, V, 1}, c.rooms[1]);
    products.run<Into::SET>(C, K, V, written_left, end, writes, K);
    const float* chunk_decay = c.prefix + (C - 1) * K;
    for (int row = 0; row < K; row++) {
      vec total = {};
      for (int j = 0; j < V; j += LANES)
        total += load(saved.start + row * V + j) * load(dM + row * V + j);
      d_chunk[row] = sum(total) * chunk_decay[row];
    }
    multiply(C, K, c.q, c.prefix, scaled);
    products.run<Into::SCALE_ADD>(K, V, C, products.left(K, C, {scaled, 1, K}, c.rooms[1]),
                                  out_right, dM, V, chunk_decay);
    multiply(C, K, c.k, c.prefix, scaled, c.beta, -1.f);
    products.run<Into::ADD>(K, V, C, products.left(K, C, {scaled, 1, K}, c.rooms[1]),
                            products.right(C, V, residual, c.rooms[2]), dM, V);
    for (int row = 0; row < C; row++)
      for (int j = 0; j < K; j += LANES) {
        int e = row * K + j;
        store(d_q + e, load(d_q + e) * load(c.prefix + e));
        store(reads + e, -load(reads + e) * load(c.prefix + e));
        vec write = load(writes + e) * load(c.suffix + e);
        store(writes + e, write);
        store(d_chunk + j, load(d_chunk + j) + write * load(c.k + e));
      }

    c.pairs_backward(d_q_on_k, d_L, d_q, reads, writes);

    // Every factor is exp(G_i - G_j): G gains where its row reads and loses where it writes.
    for (int row = 0; row < C; row++) {
      vec strength = splat(c.beta[row]), through_k = {}, through_v = {};
      for (int j = 0; j < K; j += LANES) {
        int e = row * K + j;
        vec read = load(reads + e), key = load(c.k + e);
        through_k += key * read;
        read *= strength;
        store(d_G + e, load(c.q + e) * load(d_q + e) + key * (read - load(writes + e)));
        store(writes + e, read + load(writes + e));
      }
      for (int j = 0; j < V; j += LANES) {
        vec r = load(residual + row * V + j);
        through_v += r * load(c.v + row * V + j);
        store(d_v + j, r * strength);
      }
      if (row >= tokens) continue;
      float d_beta = sum(through_k) + sum(through_v);
      write_row(d.v, b, t + row, hv, p.value_dim, d_v);
      write_row(d.beta, b, t + row, hv, 1, &d_beta);
      auto put = hv % group ? add_row : write_row;
      put(d.q, b, t + row, h, p.key_dim, d_q + row * K);
      put(d.k, b, t + row, h, p.key_dim, writes + row * K);
    }
    for (int row = C - 1; row >= 0; row--) {
      const float* fade = c.decay + row * K;
      for (int j = 0; j < K; j++) d_chunk[j] += d_G[row * K + j];
      // exp(-inf) has slope 0; do not leave rounding
      for (int j = 0; j < K; j++) d_G[row * K + j] = fade[j] == 0.f ? 0.f : d_chunk[j];
      if (row < tokens) write_row(d.log_decay, b, t + row, hv, p.key_dim, d_G + row * K);
    }
  };
  const int64_t chunks = (p.length[n] + p.chunk - 1) / p.chunk;
  for (int64_t i = chunks - 1; i >= 0; i--)
    for (int64_t hv = heads.first; hv < heads.end; hv++) walk(i, hv);
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    for (int64_t row = 0; row < p.key_dim; row++)
      memcpy(d.memory + (at + hv) * size + row * p.value_dim, memory_of(hv) + row * V,
             p.value_dim * 4);
}

// One token of one head: to = diag(decay) from + k (beta (v - k^T diag(decay) from))^T. The memory
// is read once for both products, and once more, from the cache, to be written. V columns at a
// time are a whole number of vectors, or one by one.
template <int VECS>
void step_columns(int64_t K, int64_t V, const float* q, const float* k, const float* decay,
                  float beta, float q_on_k, const float* v, const float* from, float* to,
                  float* out) {
  vec recalled[VECS] = {}, read[VECS] = {};
  for (int64_t i = 0; i < K; i++) {
    vec by_k = splat(k[i] * decay[i]), by_q = splat(q[i] * decay[i]);
    for (int j = 0; j < VECS; j++) {
      vec m = load(from + i * V + j * LANES);
      recalled[j] += by_k * m;
      read[j] += by_q * m;
    }
  }
  for (int j = 0; j < VECS; j++) {
    recalled[j] = (load(v + j * LANES) - recalled[j]) * splat(beta);  // now the delta
    store(out + j * LANES, read[j] + recalled[j] * splat(q_on_k));
  }
  for (int64_t i = 0; i < K; i++) {
    vec fade = splat(decay[i]), key = splat(k[i]);
    for (int j = 0; j < VECS; j++) {
      int64_t at = i * V + j * LANES;
      store(to + at, load(from + at) * fade + key * recalled[j]);
    }
  }
}

void step_column(int64_t K, int64_t V, const float* q, const float* k, const float* decay,
                 float beta, float q_on_k, const float* v, const float* from, float* to,
                 float* out) {
  float recalled = 0.f, read = 0.f;
  for (int64_t i = 0; i < K; i++) {
    recalled += k[i] * decay[i] * from[i * V];
    read += q[i] * decay[i] * from[i * V];
  }
  float delta = (*v - recalled) * beta;
  *out = read + delta * q_on_k;
  for (int64_t i = 0; i < K; i++) to[i * V] = from[i * V] * decay[i] + k[i] * delta;
}

void recurrent_head(const Problem& p, int64_t n, int64_t hv) {
  const int64_t K = p.key_dim, V = p.value_dim, b = p.batch_of[n];
  const int64_t h = hv / (p.value_heads / p.heads), at = (n * p.value_heads + hv) * K * V;
  const float* from = p.memory + at;
  float* to = p.final_memory + at;
  if (p.length[n] == 0) memcpy(to, from, K * V * 4);
  float q[K], k[K], decay[K], v[V], out[V], beta;
  for (int64_t t = p.start[n]; t < p.start[n] + p.length[n]; t++, from = to) {
    read_row(p.q, b, t, h, K, q);
    read_row(p.k, b, t, h, K, k);
    read_row(p.v, b, t, hv, V, v);
    read_row(p.log_decay, b, t, hv, K, decay);
    read_row(p.beta, b, t, hv, 1, &beta);
    float q_on_k = 0.f;
    for (int64_t i = 0; i < K; i++) decay[i] = exp_fast(decay[i]);
    for (int64_t i = 0; i < K; i++) q_on_k += q[i] * k[i];
    int64_t j = 0;
    for (; j + 4 * LANES <= V; j += 4 * LANES)
      step_columns<4>(K, V, q, k, decay, beta, q_on_k, v + j, from + j, to + j, out + j);
    for (; j + LANES <= V; j += LANES)
      step_columns<1>(K, V, q, k, decay, beta, q_on_k, v + j, from + j, to + j, out + j);
    for (; j < V; j++)
      step_column(K, V, q, k, decay, beta, q_on_k, v + j, from + j, to + j, out + j);
    write_row(p.out, b, t, hv, V, out);
  }
}

// Query/key heads of one task: some, where that leaves every thread two tasks.
int64_t heads_at_once(const Problem& p) {
  int64_t heads = 4;
  while (heads > 1 && p.sequences * p.heads < 2 * heads * p.num_threads) heads /= 2;
  return heads;
}

// Runs `work(sequence, heads)` for all heads of all sequences, the longest first.
template <class Work>
void each_task(const Problem& p, const int64_t* order, Work work) {
  const int64_t some = heads_at_once(p), parts = (p.heads + some - 1) / some;
  const int64_t tasks = p.sequences * parts, group = p.value_heads / p.heads;
#pragma omp parallel for schedule(dynamic) num_threads(p.num_threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t first = task % parts * some;
    const int64_t end = first + some < p.heads ? first + some : p.heads;
    work(order[task / parts], Heads{first * group, end * group});
  }
}

}  // namespace

EXPORT void kda_forward(const Problem* p, const int64_t* order) {
  const size_t K = padded(p->key_dim), V = padded(p->value_dim), C = p->chunk;
  const size_t floats = Chunk::floats(C, K, V) + C * (2 * V + 2 * C + K) + 16 * 32;
  each_task(*p, order, [&](int64_t n, Heads heads) {
    forward_heads(*p, n, heads, Scratch(floats + (heads.end - heads.first) * K * V));
  });
}

EXPORT void kda_recurrent(const Problem* p, const int64_t*) {
  const int64_t tasks = p->sequences * p->value_heads;
  // waking a second thread costs some microseconds: about what one core does with 64 KiB of memory
  const bool is_small = tasks * p->key_dim * p->value_dim < 1 << 15;
#pragma omp parallel for schedule(static) num_threads(p->num_threads) if (!is_small)
  for (int64_t task = 0; task < tasks; task++)
    recurrent_head(*p, task / p->value_heads, task % p->value_heads);
}

EXPORT void kda_backward(const Problem* p, const Gradients* d, const int64_t* order) {
  const size_t K = padded(p->key_dim), V = padded(p->value_dim), C = p->chunk;
  const size_t floats =
      Chunk::floats(C, K, V) + K * V + C * (3 * V + 2 * C + 5 * K) + V + K + 16 * 32;
  each_task(*p, order, [&](int64_t n, Heads heads) {
    backward_heads(*p, *d, n, heads, Scratch(floats + (heads.end - heads.first) * K * V));
  });
}
