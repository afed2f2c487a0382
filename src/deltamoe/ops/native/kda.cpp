// Kimi Delta Attention: over chunks, in fp32 (kda_exact.h) or, if values come in bf16, chunks have
// 32 tokens or more and the machine has AMX, with rounded products (kda_rounded.h); and token by
// token. Letters and derivation: docs/kda.md.

#include "kda_exact.h"
#include "kda_rounded_backward.h"
#include "kda_rounded_forward.h"

namespace {

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
EXPORT int64_t kda_rounds(int64_t is_bf16, int64_t chunk) {
  return rounds_products(is_bf16, chunk);
}

EXPORT void kda_forward(const Problem* p, const int64_t* order) {
  const bool rounds = rounds_products(p->v.is_bf16, p->chunk);
  const auto forward = !rounds       ? forward_exactly
                       : is_long(*p) ? forward_rounded<true>
                                     : forward_rounded<false>;
  each_task(*p, order, [&](int64_t n, Heads heads) { forward(*p, n, heads); });
}

EXPORT void kda_backward(const Problem* p, const Gradients* d, const int64_t* order) {
  const bool rounds = rounds_products(p->v.is_bf16, p->chunk);
  const auto backward = rounds ? backward_rounded : backward_exactly;
  each_task(*p, order, [&](int64_t n, Heads heads) { backward(*p, *d, n, heads); });
}

EXPORT void kda_recurrent(const Problem* p, const int64_t*) {
  const int64_t tasks = p->sequences * p->value_heads;
  // waking a second thread costs some microseconds: about what one core does with 64 KiB of memory
  const bool is_small = tasks * p->key_dim * p->value_dim < 1 << 15;
#pragma omp parallel for schedule(static) num_threads(p->num_threads) if (!is_small)
  for (int64_t task = 0; task < tasks; task++)
    recurrent_head(*p, task / p->value_heads, task % p->value_heads);
}
