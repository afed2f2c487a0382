// Kimi Delta Attention over chunks: forward, and the backward pass written by hand.
//
// One task is one sequence and a few query/key heads with their value heads; a task walks its
// chunks in order with everything it needs in this core's cache. No head's numbers depend on how
// many there are in its task, so results do not depend on the number of threads. Letters and
// derivation: docs/kda.md.
//
// Products are in fp32. If the values came in bf16 and the machine has AMX, all but the triangular
// solve round their operands to bf16 and sum in fp32, and what the backward pass wants is kept as
// it was rounded. What is an operand twice is packed once. What is as long as a long text goes past
// the caches: a store through them would first read what it overwrites.

#include "kda_chunk.h"

namespace {

struct Saved {  // a stop's share of what forward leaves for backward
  void *start = nullptr, *delta = nullptr, *q_on_k = nullptr;
  float* system = nullptr;

  static void ask_for(const Problem& p, const Stop& stop) { Saved(p, stop, true); }

  Saved(const Problem& p, const Stop& stop, bool prefetches = false) {
    if (!p.starts) return;
    const bool rounds = rounds_products(p);
    const int64_t index = stop.chunk * p.value_heads + stop.value_head;
    const int64_t K = padded(p.key_dim), C = p.chunk;
    const auto share = [&](void* all, int64_t rows, int columns, bool is_narrow) {
      const int64_t bytes = rows * (is_narrow ? in_tiles(columns) * 2 : columns * 4);
      char* mine = static_cast<char*>(all) + index * bytes;
      if (prefetches) prefetch(mine, bytes);
      return mine;
    };
    start = share(p.starts, K, padded(p.value_dim), rounds);
    delta = share(p.deltas, C, padded(p.value_dim), rounds);
    q_on_k = share(p.q_on_k, C, int(C), rounds);
    system = reinterpret_cast<float*>(share(p.system, C, int(C), false));
  }
};

void read_memory(const float* from, int64_t rows, int64_t columns, int width, int height,
                 float* to) {
  memset(to, 0, sizeof(float) * width * height);
  for (int64_t i = 0; i < rows; i++) memcpy(to + i * width, from + i * columns, columns * 4);
}

// Calls walk(stop, the one after it) for all of a task's chunks and heads.
template <class Walk>
void each_stop(const Problem& p, int64_t sequence, Heads heads, bool is_forward, Walk walk) {
  const auto stop = [&](int64_t index) { return Stop(p, sequence, heads, index, is_forward); };
  const int64_t chunks = (p.length[sequence] + p.chunk - 1) / p.chunk;
  for (int64_t i = 0; i < chunks * (heads.end - heads.first); i++) walk(stop(i), stop(i + 1));
}

void forward_heads(const Problem& p, int64_t n, Heads heads, Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, {rounds, is_long(p)});
  const auto put_row = is_long(p) ? write_far_row : write_row;
  const Products& products = c.products;
  float* memories = scratch.take(size_t(heads.end - heads.first) * K * V);
  float* own_delta = scratch.take(size_t(stride) * V);
  float* out = scratch.take(size_t(stride) * V);
  float* own_q_on_k = scratch.take(size_t(stride) * stride);
  float* own_system = scratch.take(size_t(stride) * stride);
  float* scaled = scratch.take(size_t(stride) * K);
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads;
  const auto memory_of = [&](int64_t hv) { return memories + (hv - heads.first) * K * V; };
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    read_memory(p.memory + (at + hv) * size, p.key_dim, p.value_dim, V, K, memory_of(hv));

  each_stop(p, n, heads, true, [&](const Stop& stop, const Stop& next) {
    float* M = memory_of(stop.value_head);
    const Saved saved(p, stop);
    float *delta = own_delta, *q_on_k = own_q_on_k;
    float* system = saved.system ? saved.system : own_system;
    if (saved.start && !rounds)
      delta = static_cast<float*>(saved.delta), q_on_k = static_cast<float*>(saved.q_on_k);

    c.stage(p, stop, next);
    c.stage_values(p, p.v, stop, delta);
    c.pairs(q_on_k, system);
    const int C = c.C;
    const Right start = products.right_and_keep(K, V, M, c.rooms[0], saved.start);

    for (int row = 0; row < C; row++)
      for (int j = 0; j < V; j += LANES)
        store(delta + row * V + j, load(delta + row * V + j) * splat(c.beta[row]));
    const Left recalls = c.scaled(c.k, c.prefix, c.beta, -1.f, scaled, c.rooms[1]);
    products.run<Into::ADD>(C, V, K, recalls, start, delta, V);
    c.solve(system, delta);

    const Left asks = c.scaled(c.q, c.prefix, nullptr, 1.f, scaled, c.rooms[1]);
    products.run<Into::SET>(C, V, K, asks, start, out, V);
    const Right written = products.right_and_keep(C, V, delta, c.rooms[2], saved.delta);
    bf16* room = saved.q_on_k ? static_cast<bf16*>(saved.q_on_k) : c.rooms[1];
    const Left reads = products.left(C, C, {q_on_k, stride, 1}, room);
    for (int first = 0; first < C; first += c.step())
      products.run<Into::ADD>(c.step(), V, first + c.step(), reads.from(first), written,
                              out + first * V, V);
    for (int64_t row = 0; row < stop.tokens; row++)
      put_row(p.out, stop.batch, stop.start + row, stop.value_head, p.value_dim,
              out + row * V);

    const Left writes = c.scaled_terms(c.k, c.suffix, nullptr, 1.f, scaled, c.rooms[1]);
    products.run<Into::SCALE_ADD>(K, V, C, writes, written, M, V, c.prefix + (C - 1) * K);
  });
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    for (int64_t row = 0; row < p.key_dim; row++)
      memcpy(p.final_memory + (at + hv) * size + row * p.value_dim, memory_of(hv) + row * V,
             p.value_dim * 4);
  finish_stores_past_caches();
}

void backward_heads(const Problem& p, const Gradients& d, int64_t n, Heads heads,
                    Scratch scratch) {
  const int K = padded(p.key_dim), V = padded(p.value_dim), stride = int(p.chunk);
  const bool rounds = rounds_products(p);
  const Tiles tiles(rounds);
  Chunk c(scratch, stride, K, V, {rounds, is_long(p)});
  const auto put_row = is_long(p) ? write_far_row : write_row;
  const Products& products = c.products;
  bf16 *out_rows = c.rooms[3], *end_rows = c.rooms[4], *residual_rows = c.rooms[5];
  float* memories = scratch.take(size_t(heads.end - heads.first) * K * V);  // their gradients
  float* turned = scratch.take(size_t(K) * V);
  float* v = scratch.take(size_t(stride) * V);
  float* d_out = scratch.take(2 * size_t(stride) * V);  // and below it the residual's gradient
  float* delta_turned = scratch.take(size_t(stride) * V);
  float* d_q_on_k = scratch.take(size_t(stride) * stride);
  float* d_L = scratch.take(size_t(stride) * stride);
  float* scaled = scratch.take(2 * size_t(stride) * K);
  float* d_q = scratch.take(size_t(stride) * K);
  float* reads = scratch.take(size_t(stride) * K);
  float* writes = scratch.take(size_t(stride) * K);
  float* d_v = scratch.take(V);
  float *d_chunk = scratch.take(K), *d_decay = scratch.take(K);
  const int64_t group = p.value_heads / p.heads;
  const int64_t size = p.key_dim * p.value_dim, at = n * p.value_heads;
  const auto memory_of = [&](int64_t hv) { return memories + (hv - heads.first) * K * V; };
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    read_memory(d.final_memory + (at + hv) * size, p.key_dim, p.value_dim, V, K, memory_of(hv));

  each_stop(p, n, heads, false, [&](const Stop& stop, const Stop& next) {
    float* dM = memory_of(stop.value_head);
    const Saved saved(p, stop);
    c.stage(p, stop, next);
    const int C = c.C;
    c.products_within(C, 0);
    c.stage_values(p, d.out, stop, d_out);
    for (int64_t row = 0; row < next.tokens; row++)
      prefetch_row(d.out, next.batch, next.start + row, next.value_head, p.value_dim);
    if (next.tokens) Saved::ask_for(p, next);
    float* residual = d_out + C * V;  // its gradient

    // What each delta is worth, then each residual (beta v - beta k M).
    const Left q_on_k = products.kept(saved.q_on_k, C, stride);
    const Right out_right = products.right_and_left(C, V, d_out, c.rooms[0], out_rows);
    for (int first = 0; first < C; first += c.step()) {
      const Left readers =
          products.turned(c.step(), C - first, q_on_k.from(first, first), c.rooms[1]);
      products.run<Into::SET>(c.step(), V, C - first, readers, out_right.from(first),
                              residual + first * V, V);
    }
    const Right end = products.right_and_left(K, V, dM, c.rooms[2], end_rows);
    products.run<Into::ADD>(C, V, K, c.scaled(c.k, c.suffix, nullptr, 1.f, scaled, c.rooms[1]),
                            end, residual, V);
    c.solve_transposed(saved.system, residual);
    // below those of out
    products.right_and_left(C, V, residual, c.rooms[0] + in_tiles(C) * V, residual_rows);

    // Through the pairs' two matrices.
    const Left out_left{{d_out, V, 1}, out_rows, in_tiles(V)};
    const Left residual_left{{residual, V, 1}, residual_rows, in_tiles(V)};
    const Left delta = products.kept(saved.delta, V, V);
    const Right written = products.turned(V, C, delta, delta_turned, c.rooms[2]);
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
    const Left start = products.kept(saved.start, V, V);
    const float* chunk_decay = c.prefix + (C - 1) * K;
    const auto through_start = [&](const auto* from, int width) {
      for (int row = 0; row < K; row++) {
        vec total = {};
        for (int j = 0; j < V; j += LANES)
          total += load_wide(from + row * width + j) * load(dM + row * V + j);
        d_chunk[row] = sum(total) * chunk_decay[row];
      }
    };
    if (rounds) through_start(start.packed, start.width);
    else through_start(start.wide.p, V);
    const auto to_rows = [&](float* to, const float* by, float sign) {
      return [=](int row, int column, int rows, int columns, const float* x, ptrdiff_t ldx) {
        for (int i = 0; i < rows; i++)
          for (int j = 0; j < columns; j += LANES) {
            const int at = (row + i) * K + column + j;
            store(to + at, load(x + i * ldx + j) * load(by + at) * splat(sign));
          }
      };
    };
    const Right start_turned = products.turned(V, K, start, turned, c.rooms[2]);
    products.in_blocks(C, K, V, out_left, start_turned, d_q, to_rows(d_q, c.prefix, 1.f));
    products.in_blocks(C, K, V, residual_left, start_turned, reads, to_rows(reads, c.prefix, -1.f));
    const Left end_left{{dM, V, 1}, end_rows, in_tiles(V)};
    const Right end_turned = products.turned(V, K, end_left, turned, c.rooms[2]);
    products.in_blocks(C, K, V, delta, end_turned, writes, to_rows(writes, c.suffix, 1.f));
    for (int row = 0; row < C; row++)
      for (int j = 0; j < K; j += LANES)
        store(d_chunk + j,
              load(d_chunk + j) + load(writes + row * K + j) * load(c.k + row * K + j));

    // Queries read of the memory and residuals were read from it: one product over both.
    const int terms = rounds ? in_tiles(C) : C;
    const Left asks =
        c.scaled_terms(c.q, c.prefix, nullptr, 1.f, scaled, c.rooms[1], 0, 2 * terms);
    c.scaled_terms(c.k, c.prefix, c.beta, -1.f, scaled, c.rooms[1], terms, 2 * terms);
    products.run<Into::SCALE_ADD>(K, V, 2 * terms, asks, out_right, dM, V, chunk_decay);
    c.pairs_backward(d_q_on_k, d_L, {d_q, reads, writes});

    // Every factor is exp(G_i - G_j): G gains where its row reads and loses where it writes, and
    // a token's decay is in every G from its own on.
    c.stage_values(p, p.v, stop, v);
    for (int row = C - 1; row >= 0; row--) {
      vec strength = splat(c.beta[row]), through_k = {}, through_v = {};
      for (int j = 0; j < K; j += LANES) {
        int e = row * K + j;
        vec read = load(reads + e), key = load(c.k + e), fade = load(c.decay + e);
        through_k += key * read;
        read *= strength;
        vec total = load(d_chunk + j) + load(c.q + e) * load(d_q + e) +
                    key * (read - load(writes + e));
        store(d_chunk + j, total);
        // exp(-inf) has slope 0; do not leave rounding
        store(d_decay + j, fade == vec{} ? vec{} : total);
        store(writes + e, read + load(writes + e));
      }
      for (int j = 0; j < V; j += LANES) {
        vec r = load(residual + row * V + j);
        through_v += r * load(v + row * V + j);
        store(d_v + j, r * strength);
      }
      if (row >= stop.tokens) continue;
      const int64_t b = stop.batch, t = stop.start + row, h = stop.head, hv = stop.value_head;
      float d_beta = sum(through_k) + sum(through_v);
      put_row(d.v, b, t, hv, p.value_dim, d_v);
      write_row(d.beta, b, t, hv, 1, &d_beta);
      put_row(d.log_decay, b, t, hv, p.key_dim, d_decay);
      const auto put_shared = hv % group ? add_row : group > 1 ? write_row : put_row;
      put_shared(d.q, b, t, h, p.key_dim, d_q + row * K);
      put_shared(d.k, b, t, h, p.key_dim, writes + row * K);
    }
  });
  for (int64_t hv = heads.first; hv < heads.end; hv++)
    for (int64_t row = 0; row < p.key_dim; row++)
      memcpy(d.memory + (at + hv) * size + row * p.value_dim, memory_of(hv) + row * V,
             p.value_dim * 4);
  finish_stores_past_caches();
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

// Whether what is kept for the backward pass of such values is bf16.
EXPORT int64_t kda_rounds(int64_t is_bf16) { return is_bf16 && amx_granted(); }

EXPORT void kda_forward(const Problem* p, const int64_t* order) {
  const size_t K = padded(p->key_dim), V = padded(p->value_dim), C = p->chunk;
  const size_t floats = Chunk::floats(C, K, V) + C * (2 * V + 2 * C + K);
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
      Chunk::floats(C, K, V) + K * V + C * (4 * V + 2 * C + 5 * K) + V + 2 * K;
  each_task(*p, order, [&](int64_t n, Heads heads) {
    backward_heads(*p, *d, n, heads, Scratch(floats + (heads.end - heads.first) * K * V));
  });
}
