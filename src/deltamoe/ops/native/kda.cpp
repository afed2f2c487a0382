// Kimi Delta Attention over chunks: forward, and the backward pass written by hand.
//
// One task is one sequence and one query/key head with its value heads; a task walks its chunks in
// order with everything it needs in this core's cache, so results do not depend on the number of
// threads. Letters and derivation: docs/kda.md. A chunk is cut in blocks of 16 tokens. Between two
// blocks "survival by halves" splits the decay at a cut, so a block of pairs is one matrix
// product; inside a block what each token wrote is carried along and fades step by step. Nothing
// is ever divided by a decay, so any decay in [0, 1] is exact.
//
// Products are in fp32. If the values came in bf16 and the machine has AMX, all but the triangular
// solve round their operands to bf16 and sum in fp32.
//
// Rows are padded with zeros to a multiple of 16 tokens and channels: a zero key writes nothing.

#include <cmath>
#include <cstdlib>
#include <memory>

#include "gemm_bf16.h"

namespace {

constexpr int BLOCK = 16;

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

void read_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, float* to) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16)
    for (int64_t i = 0; i < n; i++) to[i] = to_float(static_cast<bf16*>(x.data)[at + i]);
  else
    memcpy(to, static_cast<float*>(x.data) + at, n * 4);
}

void write_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16)
    for (int64_t i = 0; i < n; i++)
      static_cast<bf16*>(x.data)[at + i] = from_float<bf16>(from[i]);
  else
    memcpy(static_cast<float*>(x.data) + at, from, n * 4);
}

void add_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  float* to = static_cast<float*>(x.data) + b * x.batch + t * x.time + h * x.head;
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// Products in fp32, or in bf16 where that is wanted and faster.
struct Products {
  bf16* room = nullptr;  // null for fp32

  // room for the largest product's operands: C, K or V lines each, and as many terms
  static size_t floats(int C, int K, int V) {
    int largest = C > K ? (C > V ? C : V) : (K > V ? K : V);
    return packed_size(largest, largest + 16) + packed_size(16, 16);
  }

  template <Into into>
  void run(int M, int N, int K, Strided a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc,
           const float* scale = nullptr) const {
    if (room) gemm_bf16<into>(M, N, K, a, b, ldb, c, ldc, room, scale);
    else gemm<into>(M, N, K, a, b, ldb, c, ldc, scale);
  }
};

bool rounds_products(const Problem& p) { return p.v.is_bf16 && amx_granted(); }

// to = x * y, row by row; `by` scales each row if given. All [rows, width].
void multiply(int rows, int width, const float* x, const float* y, float* to,
              const float* by = nullptr) {
  for (int i = 0; i < rows; i++) {
    vec scale = splat(by ? by[i] : 1.f);
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

  static size_t floats(int C, int K, int V) {
    return size_t(C) * (6 * K + V + 1) + 4 * size_t(C) * K + size_t(BLOCK) * 2 * K +
           Products::floats(C, K, V) + 16 * 20;
  }

  Chunk(Scratch& s, int C_, int K_, int V_, bool rounds) : C(C_), K(K_), V(V_), stride(C_) {
    if (rounds) products.room = reinterpret_cast<bf16*>(s.take(Products::floats(C, K, V)));
    q = s.take(C * K), k = s.take(C * K), v = s.take(C * V), beta = s.take(C);
    decay = s.take(C * K), prefix = s.take(C * K), suffix = s.take(C * K);
    right = s.take(C * K), left = s.take(C * K), turned = s.take(C * K);
    fading = s.take(2 * BLOCK * K);
  }

  // Read n tokens from `t` on and fill up with tokens that change nothing.
  void stage(const Problem& p, int64_t b, int64_t t, int64_t n, int64_t h, int64_t hv) {
    C = rows_for(n);
    memset(q, 0, sizeof(float) * C * K), memset(k, 0, sizeof(float) * C * K);
    memset(v, 0, sizeof(float) * C * V), memset(beta, 0, sizeof(float) * C);
    memset(decay, 0, sizeof(float) * C * K);
    for (int64_t i = 0; i < n; i++) {
      read_row(p.q, b, t + i, h, p.key_dim, q + i * K);
      read_row(p.k, b, t + i, h, p.key_dim, k + i * K);
      read_row(p.v, b, t + i, hv, p.value_dim, v + i * V);
      read_row(p.log_decay, b, t + i, hv, p.key_dim, decay + i * K);
      read_row(p.beta, b, t + i, hv, 1, beta + i);
    }
    for (int i = 0; i < C * K; i++) decay[i] = exp_fast(decay[i]);
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

  // The same within blocks of 16: the first level.
  void block_products() {
    for (int first = 0; first < C; first += BLOCK) {
      float *p = prefix + first * K, *s = suffix + first * K, *d = decay + first * K;
      memcpy(p, d, sizeof(float) * K);
      for (int i = 1; i < BLOCK; i++)
        for (int j = 0; j < K; j++) p[i * K + j] = p[(i - 1) * K + j] * d[i * K + j];
      for (int j = 0; j < K; j++) s[(BLOCK - 1) * K + j] = 1.f;
      for (int i = BLOCK - 2; i >= 0; i--)
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

  // What row i reads of column j <= i with its query (q_on_k, zero above the diagonal), and with
  // beta times its key (system, j < i). On the diagonal blocks, system gets (I + L)^-1.
  // Leaves the whole chunk's products in prefix and suffix.
  void pairs(float* q_on_k, float* system) {
    for (int first = 0; first < C; first += BLOCK) diagonal_block(first, q_on_k, system);
    block_products();
    for (int half = BLOCK; half < C; half *= 2) {
      for (int first = 0; first < C; first += 2 * half) {
        scale_halves(first, half);
        transpose(half, K, left, K, turned, half);
        ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
        products.run<Into::SET>(half, half, K, {right, K, 1}, turned, half, q_on_k + at, stride);
        products.run<Into::SET>(half, half, K, {right + half * K, K, 1}, turned, half, system + at,
                        stride);
      }
      double_products(half);
    }
  }

  void diagonal_block(int first, float* q_on_k, float* system) {
    float L[BLOCK][BLOCK];
    for (int t = 0; t < BLOCK; t++) {
      const float *q_t = q + (first + t) * K, *k_t = k + (first + t) * K;
      const float* decay_t = decay + (first + t) * K;
      float* reads = q_on_k + ptrdiff_t(first + t) * stride + first;
      for (int s = 0; s < t; s++) {
        float* wrote = fading + s * K;
        vec by_q = {}, by_k = {};
        for (int j = 0; j < K; j += LANES) {
          vec left = load(wrote + j) * load(decay_t + j);
          store(wrote + j, left);
          by_q += left * load(q_t + j);
          by_k += left * load(k_t + j);
        }
        reads[s] = sum(by_q);
        L[t][s] = sum(by_k) * beta[first + t];
      }
      vec by_q = {};
      for (int j = 0; j < K; j += LANES) {
        store(fading + t * K + j, load(k_t + j));
        by_q += load(k_t + j) * load(q_t + j);
      }
      reads[t] = sum(by_q);
      for (int s = t + 1; s < BLOCK; s++) reads[s] = 0.f;
    }
    float inverse[BLOCK][BLOCK] = {};
    for (int t = 0; t < BLOCK; t++) {
      for (int s = 0; s < t; s++)
        for (int j = 0; j < BLOCK; j++) inverse[t][j] -= L[t][s] * inverse[s][j];
      inverse[t][t] = 1.f;
      memcpy(system + ptrdiff_t(first + t) * stride + first, inverse[t], sizeof inverse[t]);
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
    block_products();
    for (int half = BLOCK; half < C; half *= 2) {
      for (int first = 0; first < C; first += 2 * half) {
        scale_halves(first, half);
        ptrdiff_t at = ptrdiff_t(first + half) * stride + first;
        int rows = (first + half) * K, columns = first * K;
        products.run<Into::SET>(half, K, half, {d_q_on_k + at, stride, 1}, left, K, turned, K);
        add_scaled(half, turned, prefix + rows, row_q + rows);
        products.run<Into::SET>(half, K, half, {d_L + at, stride, 1}, left, K, turned, K);
        add_scaled(half, turned, prefix + rows, row_k + rows);
        products.run<Into::SET>(half, K, half, {d_q_on_k + at, 1, stride}, right, K, turned, K);
        products.run<Into::ADD>(half, K, half, {d_L + at, 1, stride}, right + half * K, K, turned, K);
        add_scaled(half, turned, suffix + columns, column_k + columns);
      }
      double_products(half);
    }
  }

  void add_scaled(int rows, const float* x, const float* by, float* to) {
    for (int i = 0; i < rows * K; i += LANES) store(to + i, load(to + i) + load(x + i) * load(by + i));
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

void forward_head(const Problem& p, int64_t n, int64_t hv, Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, rounds);
  const Products& products = c.products;
  float* M = scratch.take(size_t(K) * V);
  float* own_delta = scratch.take(size_t(stride) * V);
  float* out = scratch.take(size_t(stride) * V);
  float* own_q_on_k = scratch.take(size_t(stride) * stride);
  float* own_system = scratch.take(size_t(stride) * stride);
  float* scaled = scratch.take(size_t(stride) * K);
  const int64_t h = hv / (p.value_heads / p.heads), b = p.batch_of[n];
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads + hv;
  read_memory(p.memory + at * size, p.key_dim, p.value_dim, V, K, M);

  for (int64_t done = 0, i = p.first_chunk[n]; done < p.length[n]; done += p.chunk, i++) {
    int64_t tokens = p.length[n] - done < p.chunk ? p.length[n] - done : p.chunk;
    int64_t t = p.start[n] + done;
    float *delta = own_delta, *q_on_k = own_q_on_k, *system = own_system;
    if (p.starts) {
      Saved saved(p, i, hv);
      delta = saved.delta, q_on_k = saved.q_on_k, system = saved.system;
      memcpy(saved.start, M, sizeof(float) * K * V);
    }
    c.stage(p, b, t, tokens, h, hv);
    c.pairs(q_on_k, system);
    const int C = c.C;

    for (int row = 0; row < C; row++)
      for (int j = 0; j < V; j += LANES)
        store(delta + row * V + j, load(c.v + row * V + j) * splat(c.beta[row]));
    multiply(C, K, c.k, c.prefix, scaled, c.beta);
    products.run<Into::SUB>(C, V, K, {scaled, K, 1}, M, V, delta, V);
    c.solve(system, delta);

    multiply(C, K, c.q, c.prefix, scaled);
    products.run<Into::SET>(C, V, K, {scaled, K, 1}, M, V, out, V);
    for (int first = 0; first < C; first += BLOCK)
      products.run<Into::ADD>(BLOCK, V, first + BLOCK, {q_on_k + ptrdiff_t(first) * stride, stride, 1},
                      delta, V, out + first * V, V);
    for (int64_t row = 0; row < tokens; row++)
      write_row(p.out, b, t + row, hv, p.value_dim, out + row * V);

    multiply(C, K, c.k, c.suffix, scaled);
    products.run<Into::SCALE_ADD>(K, V, C, {scaled, 1, K}, delta, V, M, V, c.prefix + (C - 1) * K);
  }
  for (int64_t row = 0; row < p.key_dim; row++)
    memcpy(p.final_memory + at * size + row * p.value_dim, M + row * V, p.value_dim * 4);
}

void backward_head(const Problem& p, const Gradients& d, int64_t n, int64_t hv, Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, rounds);
  const Products& products = c.products;
  float* dM = scratch.take(size_t(K) * V);
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
  const int64_t group = p.value_heads / p.heads, h = hv / group, b = p.batch_of[n];
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads + hv;
  read_memory(d.final_memory + at * size, p.key_dim, p.value_dim, V, K, dM);

  const int64_t chunks = (p.length[n] + p.chunk - 1) / p.chunk;
  for (int64_t i = chunks - 1; i >= 0; i--) {
    Saved saved(p, p.first_chunk[n] + i, hv);
    int64_t done = i * p.chunk, t = p.start[n] + done;
    int64_t tokens = p.length[n] - done < p.chunk ? p.length[n] - done : p.chunk;
    c.stage(p, b, t, tokens, h, hv);
    c.whole_products();
    const int C = c.C;
    memset(d_out, 0, sizeof(float) * C * V);
    for (int64_t row = 0; row < tokens; row++)
      read_row(d.out, b, t + row, hv, p.value_dim, d_out + row * V);

    // What each delta is worth, then each residual (beta v - beta k M).
    for (int first = 0; first < C; first += BLOCK)
      products.run<Into::SET>(BLOCK, V, C - first,
                      {saved.q_on_k + ptrdiff_t(first) * stride + first, 1, stride},
                      d_out + first * V, V, residual + first * V, V);
    multiply(C, K, c.k, c.suffix, scaled);
    products.run<Into::ADD>(C, V, K, {scaled, K, 1}, dM, V, residual, V);
    c.solve_transposed(saved.system, residual);

    // Through the pairs' two matrices.
    transpose(C, V, saved.delta, V, delta_turned, C);
    for (int first = 0; first < C; first += BLOCK) {
      float* rows_q = d_q_on_k + ptrdiff_t(first) * stride;
      float* rows_L = d_L + ptrdiff_t(first) * stride;
      products.run<Into::SET>(BLOCK, first + BLOCK, V, {d_out + first * V, V, 1}, delta_turned, C, rows_q,
                      stride);
      products.run<Into::SET>(BLOCK, first + BLOCK, V, {residual + first * V, V, 1}, delta_turned, C,
                      rows_L, stride);
      for (int row = 0; row < BLOCK; row++)
        for (int j = 0; j < first + BLOCK; j++)
          rows_L[row * stride + j] = j < first + row ? -rows_L[row * stride + j] : 0.f;
    }

    // Through the memory at the chunk's start and the one at its end.
    transpose(K, V, saved.start, V, turned, K);
    products.run<Into::SET>(C, K, V, {d_out, V, 1}, turned, K, d_q, K);
    products.run<Into::SET>(C, K, V, {residual, V, 1}, turned, K, reads, K);
    transpose(K, V, dM, V, turned, K);
    products.run<Into::SET>(C, K, V, {saved.delta, V, 1}, turned, K, writes, K);
    const float* chunk_decay = c.prefix + (C - 1) * K;
    for (int row = 0; row < K; row++) {
      vec total = {};
      for (int j = 0; j < V; j += LANES)
        total += load(saved.start + row * V + j) * load(dM + row * V + j);
      d_chunk[row] = sum(total) * chunk_decay[row];
    }
    multiply(C, K, c.q, c.prefix, scaled);
    products.run<Into::SCALE_ADD>(K, V, C, {scaled, 1, K}, d_out, V, dM, V, chunk_decay);
    multiply(C, K, c.k, c.prefix, scaled, c.beta);
    products.run<Into::SUB>(K, V, C, {scaled, 1, K}, residual, V, dM, V);
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
  }
  for (int64_t row = 0; row < p.key_dim; row++)
    memcpy(d.memory + at * size + row * p.value_dim, dM + row * V, p.value_dim * 4);
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

// Runs `work(sequence, head)` for all query/key heads of all sequences, the longest first.
template <class Work>
void each_head(const Problem& p, const int64_t* order, Work work) {
  const int64_t tasks = p.sequences * p.heads;
#pragma omp parallel for schedule(dynamic) num_threads(p.num_threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; task++) work(order[task / p.heads], task % p.heads);
}

}  // namespace

EXPORT void kda_forward(const Problem* p, const int64_t* order) {
  const size_t K = padded(p->key_dim), V = padded(p->value_dim), C = p->chunk;
  const size_t floats = Chunk::floats(C, K, V) + K * V + C * (2 * V + 2 * C + K) + 16 * 32;
  const int64_t group = p->value_heads / p->heads;
  each_head(*p, order, [&](int64_t n, int64_t h) {
    for (int64_t hv = h * group; hv < (h + 1) * group; hv++)
      forward_head(*p, n, hv, Scratch(floats));
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
      Chunk::floats(C, K, V) + 2 * K * V + C * (3 * V + 2 * C + 5 * K) + V + K + 16 * 32;
  const int64_t group = p->value_heads / p->heads;
  each_head(*p, order, [&](int64_t n, int64_t h) {
    for (int64_t hv = h * group; hv < (h + 1) * group; hv++)
      backward_head(*p, *d, n, hv, Scratch(floats));
  });
}
