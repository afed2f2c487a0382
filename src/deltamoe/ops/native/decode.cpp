// One token of every row through a whole model: what model/decoder.py calls once a token.
//
// A step is a row of phases with a barrier between them. In a phase each thread does its share of
// tiles of outputs, of heads, or of stretches of the attention's past; every matrix is read once,
// whatever the number of rows, and of the experts only those that some row chose. What is small
// (norms, the routing, rounding to 8 bits) every thread does for itself, which is cheaper than one
// more barrier. Activations and sums are fp32 for every kind of weight. Neither the number of
// threads nor the rows beside a row change a bit of its results.
//
// The memory's step is that of ops/kda/reference.py, attention the absorbed form of ops/mla.py.

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <vector>

#include "matvec.h"
#include "team.h"

// The model as model/decoder.py describes it. Every field is eight bytes, so that no compiler pads.

struct Kda {
  int64_t heads, value_heads, key_dim, value_dim, conv_size, is_bounded, output_gate;
  double lower_bound, max_beta, norm_eps;
  Matrix q, k, v, decay_down, decay_up, beta, gate_down, gate_up, o;
  const float* taps;     // [conv_size, channels], oldest first
  const float* rate;     // [value_heads]
  const float* dt_bias;  // [value_heads, key_dim]
  const float* norm;     // [value_dim]

  int64_t channels() const { return 2 * heads * key_dim + value_heads * value_dim; }
};
enum OutputGate : int64_t { OPEN = 0, SIGMOID = 1, SWISH = 2 };

struct Mla {
  int64_t heads, latent_dim, nope_dim, rope_dim, value_dim, has_rope;
  double norm_eps, latent_eps;
  Matrix q, q_up, latent, latent_up, o;  // q_up without rows: q makes the queries at once
  const float *query_norm, *latent_norm;
  const float* frequencies;  // [rope_dim / 2]

  int64_t query_dim() const { return nope_dim + rope_dim; }
};

struct Channel {
  Matrix gate, up, down;  // the MLP, or the shared expert; without rows: none, or no gate
  int64_t num_experts, experts_per_token, scoring, renormalizes, num_groups, groups_per_token;
  int64_t weighs_with_bias;
  double routed_scale;
  const float* bias;
  Matrix router, w_gate, w_up, w_down;  // w_*: the first of num_experts
};
enum Scoring : int64_t { BY_SIGMOID = 0, BY_SOFTMAX = 1, BY_TOPK_SOFTMAX = 2 };

struct Layer {
  int64_t is_mla;
  const float *mixer_norm, *channel_norm;
  Kda kda;
  Mla mla;
  Channel channel;
};

struct Model {
  int64_t dim, vocab, num_layers, state_kind;  // FP32 or BF16: of the convolution and latents
  double norm_eps;
  const float* norm;
  Matrix embedding, head;
  const Layer* layers;
};

// Where one layer's state lies, [B, ...] each: that of KDA before and after, and an MLA layer's
// cache, which has room for `capacity` tokens a row and is appended to in place.
struct LayerState {
  const void* conv;
  void* conv_after;
  const float* memory;
  float* memory_after;
  void *latent, *rope_key;
  int64_t capacity;
};

namespace {

constexpr int64_t LARGE = 1 << 20;  // bytes of all layers' memories

template <class T>
struct CacheLines {  // an allocator
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) {
    void* p = std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
    if (!p) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }
};
template <class T>
using Room = std::vector<T, CacheLines<T>>;

// `p` is a whole number of vectors from a line's start.
inline void store_past_caches(float* p, vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
inline void finish_stores_past_caches() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Vectors of one width, zero up to their padded width.
struct Rows {
  Room<float> numbers;
  int64_t stride = 0;

  void reserve(int64_t count, int64_t width) {
    stride = std::max(stride, padded(width));
    if (int64_t(numbers.size()) < count * stride) numbers.assign(count * stride, 0.f);
  }
  float* operator[](int64_t i) { return numbers.data() + i * stride; }
};

// Vectors ready for products; quantised ones too if a matrix needs that.
struct Prepared {
  std::vector<Vector> vectors;
  Room<int8_t> codes;
  Room<float> scales;
  Room<int32_t> sums;

  const Vector* set(Rows& rows, int64_t count, int64_t width, bool quantizes) {
    const int64_t stride = padded(width), groups = stride / GROUP;
    if (int64_t(vectors.size()) < count) vectors.resize(count);
    if (quantizes && int64_t(codes.size()) < count * stride) {
      codes.resize(count * stride);
      scales.resize(count * groups);
      sums.resize(count * groups);
    }
    for (int64_t i = 0; i < count; i++) {
      vectors[i] = {rows[i], codes.data() + i * stride, scales.data() + i * groups,
                    sums.data() + i * groups};
      if (quantizes)
        quantize(rows[i], width, codes.data() + i * stride, scales.data() + i * groups,
                 sums.data() + i * groups);
    }
    return vectors.data();
  }
};

inline float sigmoid(float x) { return 1.f / (1.f + exp_fast(-x)); }
inline float silu(float x) { return x / (1.f + exp_fast(-x)); }

// log(1 + e^x); log(1 + u) for u in [0, 1] as 2 artanh(u / (2 + u)).
inline float softplus(float x) {
  float u = exp_fast(x > 0.f ? -x : x), s = u / (2.f + u), s2 = s * s;
  float p = 1.f / 17.f;
  p = p * s2 + 1.f / 15.f;
  p = p * s2 + 1.f / 13.f;
  p = p * s2 + 1.f / 11.f;
  p = p * s2 + 1.f / 9.f;
  p = p * s2 + 1.f / 7.f;
  p = p * s2 + 1.f / 5.f;
  p = p * s2 + 1.f / 3.f;
  return (x > 0.f ? x : 0.f) + 2.f * (s + s * s2 * p);
}

float sum_of_squares(const float* x, int64_t n) {
  vec total = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total += load(x + i) * load(x + i);
  float rest = 0.f;
  for (; i < n; i++) rest += x[i] * x[i];
  return sum(total) + rest;
}

void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* y) {
  const float by = 1.f / std::sqrt(sum_of_squares(x, n) / float(n) + float(eps));
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * by * weight[i];
}

void unit_length(float* x, int64_t n, float scale) {
  const float by = scale / std::sqrt(sum_of_squares(x, n) + 1e-6f);
  for (int64_t i = 0; i < n; i++) x[i] *= by;
}

// One head's memory [K, V] by one token; V a multiple of LANES. What is read from the updated
// memory is known before it is updated: S'^T q = S^T (decay q) + (k.q) write.
//
// Where all memories together are larger than a cache, `after` is written past the caches
// (`streams`): nothing reads it before the next token, and a store through the cache would first
// read what it overwrites. That is a third of the step's traffic, and time.
template <int VECS, bool streams>
void delta_columns(int64_t K, int64_t V, const float* before, float* after, const float* retained,
                   const float* q, const float* k, const float* v, float beta, float k_q,
                   float* out) {
  vec predicted[VECS] = {}, read[VECS] = {};
  for (int64_t i = 0; i < K; i++) {
    const vec by_k = splat(retained[i] * k[i]), by_q = splat(retained[i] * q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      const float* at = before + i * V + j * LANES;
      __builtin_prefetch(at + 1024, 0, 2);
      vec here = load(at);
      predicted[j] += here * by_k;
      read[j] += here * by_q;
    }
  }
  vec write[VECS];
#pragma GCC unroll 8
  for (int j = 0; j < VECS; j++) {
    write[j] = splat(beta) * (load(v + j * LANES) - predicted[j]);
    store(out + j * LANES, read[j] + splat(k_q) * write[j]);
  }
  for (int64_t i = 0; i < K; i++) {
    const vec keep = splat(retained[i]), by = splat(k[i]);
#pragma GCC unroll 8
    for (int j = 0; j < VECS; j++) {
      const int64_t at = i * V + j * LANES;
      __builtin_prefetch(before + K * V + at, 0, 2);  // the next head's
      vec here = load(before + at) * keep + by * write[j];
      if (streams) store_past_caches(after + at, here);
      else store(after + at, here);
    }
  }
}

template <bool streams>
void delta_step(int64_t K, int64_t V, const float* before, float* after, const float* retained,
                const float* q, const float* k, const float* v, float beta, float* out) {
  float k_q = 0.f;
  for (int64_t i = 0; i < K; i++) k_q += k[i] * q[i];
  int64_t n = 0;
  auto columns = [&](auto step, int64_t width) {
    for (; n + width <= V; n += width)
      step(K, V, before + n, after + n, retained, q, k, v + n, beta, k_q, out + n);
  };
  columns(delta_columns<8, streams>, 8 * LANES);
  columns(delta_columns<4, streams>, 4 * LANES);
  columns(delta_columns<1, streams>, LANES);
}

struct Target {  // y[b] begins at p + b * stride
  float* p;
  int64_t stride;
};
Target into(Rows& rows) { return {rows[0], rows.stride}; }

struct Job {
  const Matrix& matrix;
  const Vector* x;
  Target to;
};

// What the rows chose in one layer, by expert: rows of `members` are b * experts_per_token + slot.
struct Routes {
  std::vector<int64_t> ids, experts, starts, members;
  std::vector<float> weights, preference;
};

struct Thread {
  int me = 0, all = 1;
  Rows normed, q, k, v, retained, out, memory_before, memory_after, scores, query,
      sources;
  Prepared a, b;
  std::vector<Vector> gathered;
  Room<float> tile, other_tile;
  Routes routes;

  // This thread's part of n units.
  int64_t begin(int64_t n) const { return n * me / all; }
  int64_t end(int64_t n) const { return n * (me + 1) / all; }
};

int64_t rows_in(const Matrix& m, int64_t tile) {
  return std::min<int64_t>(TILE, m.rows - tile * TILE);
}

class Decoder {
 public:
  explicit Decoder(const Model& model)
      : model_(model), layers_(model.layers, model.layers + model.num_layers) {}

  void step(const int64_t* ids, int64_t batch, const int64_t* past, const LayerState* states,
            float* logits, int threads) {
    reserve(batch, past, threads);
    team_.run(threads, [&](int me) {
      Thread& t = threads_[me];
      t.me = me;
      t.all = threads;
      run(t, ids, past, states, logits);
    });
  }

 private:
  Model model_;
  std::vector<Layer> layers_;
  int64_t batch_ = 0;
  bool streams_ = false;
  std::vector<Thread> threads_;
  Team team_;
  Rows x_, answer_;
  Rows q_, k_, v_, decay_down_, decay_, beta_, gate_down_, gate_, mixed_;
  Rows query_down_, query_, latent_, q_latent_, q_rope_, sources_, attended_;
  Rows hidden_, shared_hidden_, router_, expert_hidden_;
  Room<float> largest_, total_;

  void meet(const Thread& t) { team_.meet(t.all); }

  void reserve(int64_t batch, const int64_t* past, int threads) {
    batch_ = batch;
    const int64_t dim = model_.dim;
    int64_t heads = 1, chosen = 0, remembered = 0;
    x_.reserve(batch, dim);
    answer_.reserve(batch, dim);
    for (const Layer& layer : layers_) {
      const Channel& c = layer.channel;
      if (layer.is_mla) {
        const Mla& m = layer.mla;
        heads = std::max(heads, m.heads);
        if (m.q_up.rows) query_down_.reserve(batch, m.q.rows);
        query_.reserve(batch, m.heads * m.query_dim());
        latent_.reserve(batch, m.latent_dim + m.rope_dim);
        q_latent_.reserve(batch * m.heads, m.latent_dim);
        q_rope_.reserve(batch * m.heads, m.rope_dim);
        int64_t units = 0;
        for (int64_t b = 0; b < batch; b++) units += stretches(past[b] + 1);
        sources_.reserve(units * m.heads, m.latent_dim);
        if (int64_t(largest_.size()) < units * m.heads) {
          largest_.resize(units * m.heads);
          total_.resize(units * m.heads);
        }
        attended_.reserve(batch, m.heads * m.value_dim);
      } else {
        const Kda& m = layer.kda;
        q_.reserve(batch, m.q.rows);
        k_.reserve(batch, m.k.rows);
        v_.reserve(batch, m.v.rows);
        decay_down_.reserve(batch, m.decay_down.rows);
        decay_.reserve(batch, m.decay_up.rows);
        beta_.reserve(batch, m.beta.rows);
        gate_down_.reserve(batch, m.gate_down.rows);
        gate_.reserve(batch, m.gate_up.rows);
        mixed_.reserve(batch, m.v.rows);
        remembered += batch * m.value_heads * m.key_dim * m.value_dim;
      }
      (c.num_experts ? shared_hidden_ : hidden_).reserve(batch, c.up.rows);
      if (c.num_experts) {
        router_.reserve(batch, c.num_experts);
        expert_hidden_.reserve(batch * c.experts_per_token, c.w_up.rows);
        chosen = std::max(chosen, c.experts_per_token);
      }
    }
    streams_ = remembered * int64_t(sizeof(float)) > LARGE;
    if (int(threads_.size()) < threads) threads_.resize(threads);
    const int64_t most = std::max(batch * std::max<int64_t>(chosen, 1), heads);
    for (Thread& t : threads_) {
      t.normed.reserve(batch, dim);
      t.query.reserve(batch, query_down_.stride);
      t.sources.reserve(batch, q_latent_.stride);
      if (int64_t(t.tile.size()) < most * TILE) {
        t.tile.resize(most * TILE);
        t.other_tile.resize(most * TILE);
        t.gathered.resize(most);
      }
    }
  }

  void run(Thread& t, const int64_t* ids, const int64_t* past, const LayerState* states,
           float* logits) {
    if (t.me == 0)
      for (int64_t b = 0; b < batch_; b++) read_row(model_.embedding, ids[b], x_[b]);
    meet(t);
    for (int64_t i = 0; i < model_.num_layers; i++) {
      const Layer& layer = layers_[i];
      normalize(t, layer.mixer_norm);
      if (layer.is_mla) {
        if (model_.state_kind == BF16) attend<bf16>(t, layer.mla, states[i], past);
        else attend<float>(t, layer.mla, states[i], past);
      } else {
        if (model_.state_kind == BF16) remember<bf16>(t, layer.kda, states[i]);
        else remember<float>(t, layer.kda, states[i]);
      }
      normalize(t, layer.channel_norm);
      answer(t, layer.channel);
    }
    normalize(t, model_.norm);
    const Vector* x = prepare(t.a, t.normed, model_.dim, {&model_.head});
    multiply(t, {{model_.head, x, {logits, model_.vocab}}});
  }

  void read_row(const Matrix& m, int64_t row, float* to) const {
    if (m.kind == FP32) {
      memcpy(to, static_cast<const float*>(m.values) + row * m.columns, m.columns * 4);
      return;
    }
    if (m.kind == BF16) {
      const bf16* from = static_cast<const bf16*>(m.values) + row * m.columns;
      for (int64_t i = 0; i < m.columns; i++) to[i] = to_float(from[i]);
      return;
    }
    const bool is_int8 = m.kind == INT8;
    const int64_t first = row / TILE * m.groups(), lane = row % TILE;
    for (int64_t i = 0; i < m.columns; i++) {
      const int64_t group = first + i / GROUP, in_group = i % GROUP;
      const uint8_t* codes =
          static_cast<const uint8_t*>(m.values) + group * (is_int8 ? 512 : 256) + 4 * lane + i % 4;
      int code = is_int8 ? codes[in_group / 4 * 64] - 128
                         : (codes[in_group / 8 * 64] >> (in_group % 8 < 4 ? 0 : 4) & 15) - 8;
      to[i] = float(code) *
              half_to_float(static_cast<const uint16_t*>(m.scales)[group * TILE + lane]);
    }
  }

  // Every thread has all rows normalised in its own memory.
  void normalize(Thread& t, const float* weight) {
    for (int64_t b = 0; b < batch_; b++)
      rms_norm(x_[b], weight, model_.dim, model_.norm_eps, t.normed[b]);
  }

  const Vector* prepare(Prepared& room, Rows& rows, int64_t width,
                        std::initializer_list<const Matrix*> readers, int64_t count = 0) {
    bool quantizes = false;
    for (const Matrix* m : readers) quantizes |= m->rows && m->is_quantized();
    return room.set(rows, count ? count : batch_, width, quantizes);
  }

  // Every job's matrix times its vectors; threads share the tiles of all.
  void multiply(Thread& t, std::initializer_list<Job> jobs) {
    int64_t tiles = 0, base = 0;
    for (const Job& job : jobs) tiles += job.matrix.tiles();
    const int64_t begin = t.begin(tiles), end = t.end(tiles);
    for (const Job& job : jobs) {
      const Matrix& m = job.matrix;
      const int64_t stop = std::min(end - base, m.tiles());
      for (int64_t tile = std::max<int64_t>(begin - base, 0); tile < stop; tile++) {
        tile_product(m, tile, job.x, batch_, t.tile.data());
        for (int64_t b = 0; b < batch_; b++)
          memcpy(job.to.p + b * job.to.stride + tile * TILE, t.tile.data() + b * TILE,
                 rows_in(m, tile) * sizeof(float));
      }
      base += m.tiles();
    }
  }

  // x += matrix times what the mixer made.
  void add_to_stream(Thread& t, const Matrix& m, Rows& from) {
    const Vector* v = prepare(t.a, from, m.columns, {&m});
    for (int64_t tile = t.begin(m.tiles()); tile < t.end(m.tiles()); tile++) {
      tile_product(m, tile, v, batch_, t.tile.data());
      for (int64_t b = 0; b < batch_; b++)
        for (int64_t i = 0; i < rows_in(m, tile); i++)
          x_[b][tile * TILE + i] += t.tile[b * TILE + i];
    }
    meet(t);
  }

  // --- KDA ------------------------------------------------------------------------------------

  template <class T>
  void remember(Thread& t, const Kda& m, const LayerState& state) {
    const Vector* x = prepare(t.a, t.normed, model_.dim,
                              {&m.q, &m.k, &m.v, &m.decay_down, &m.beta, &m.gate_down});
    multiply(t, {{m.q, x, into(q_)},
                 {m.k, x, into(k_)},
                 {m.v, x, into(v_)},
                 {m.decay_down, x, into(decay_down_)},
                 {m.beta, x, into(beta_)},
                 {m.gate_down, x, into(gate_down_)}});
    meet(t);
    const Vector* decay = prepare(t.a, decay_down_, m.decay_down.rows, {&m.decay_up});
    const Vector* gate = prepare(t.b, gate_down_, m.gate_down.rows, {&m.gate_up});
    multiply(t, {{m.decay_up, decay, into(decay_)}, {m.gate_up, gate, into(gate_)}});
    meet(t);
    t.q.reserve(1, m.key_dim);
    t.k.reserve(1, m.key_dim);
    t.v.reserve(1, m.value_dim);
    t.retained.reserve(1, m.key_dim);
    t.out.reserve(1, m.value_dim);
    const int64_t units = batch_ * m.value_heads;
    for (int64_t i = t.begin(units); i < t.end(units); i++)
      head<T>(t, m, state, i / m.value_heads, i % m.value_heads);
    if (streams_) finish_stores_past_caches();
    meet(t);
    add_to_stream(t, m.o, mixed_);
  }

  template <class T>
  void head(Thread& t, const Kda& m, const LayerState& state, int64_t b, int64_t h) {
    const int64_t K = m.key_dim, V = m.value_dim, group = m.value_heads / m.heads;
    const int64_t key_head = h / group;
    float *q = t.q[0], *k = t.k[0], *v = t.v[0], *retained = t.retained[0], *out = t.out[0];
    const bool writes = h % group == 0;  // several value heads read one head of q and k
    convolve<T>(m, state, b, key_head * K, K, q_[b] + key_head * K, writes, q);
    convolve<T>(m, state, b, (m.heads + key_head) * K, K, k_[b] + key_head * K, writes, k);
    convolve<T>(m, state, b, 2 * m.heads * K + h * V, V, v_[b] + h * V, true, v);
    unit_length(q, K, 1.f / std::sqrt(float(K)));
    unit_length(k, K, 1.f);

    const float *logits = decay_[b] + h * K, *bias = m.dt_bias + h * K, rate = m.rate[h];
    const float lower_bound = float(m.lower_bound);
    if (m.is_bounded) {
#pragma omp simd
      for (int64_t i = 0; i < K; i++)
        retained[i] = exp_fast(lower_bound * sigmoid(rate * (logits[i] + bias[i])));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < K; i++)
        retained[i] = exp_fast(-rate * softplus(logits[i] + bias[i]));
    }
    const float beta = sigmoid(beta_[b][h]) * float(m.max_beta);

    const int64_t at = (b * m.value_heads + h) * K * V;
    if (V % LANES == 0) {
      const bool is_aligned = reinterpret_cast<uintptr_t>(state.memory_after) % 64 == 0;
      auto step = streams_ && is_aligned ? delta_step<true> : delta_step<false>;
      step(K, V, state.memory + at, state.memory_after + at, retained, q, k, v, beta, out);
    } else {  // through copies with rows of whole vectors
      const int64_t wide = padded(V);
      t.memory_before.reserve(K, V);
      t.memory_after.reserve(K, V);
      for (int64_t i = 0; i < K; i++)
        memcpy(t.memory_before[i], state.memory + at + i * V, V * sizeof(float));
      delta_step<false>(K, wide, t.memory_before[0], t.memory_after[0], retained, q, k, v, beta, out);
      for (int64_t i = 0; i < K; i++)
        memcpy(state.memory_after + at + i * V, t.memory_after[i], V * sizeof(float));
    }

    float* to = mixed_[b] + h * V;
    rms_norm(out, m.norm, V, m.norm_eps, to);
    const float* gate = m.output_gate == OPEN ? nullptr : gate_[b] + h * V;
    if (m.output_gate == SIGMOID) {
#pragma omp simd
      for (int64_t i = 0; i < V; i++) to[i] *= sigmoid(gate[i]);
    } else if (m.output_gate == SWISH) {
#pragma omp simd
      for (int64_t i = 0; i < V; i++) to[i] *= silu(gate[i]);
    }
  }

  template <class T>
  static void convolve(const Kda& m, const LayerState& state, int64_t b, int64_t first, int64_t n,
                       const float* x, bool writes, float* y) {
    if (!m.conv_size) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = silu(x[i]);
      return;
    }
    const int64_t channels = m.channels(), past = m.conv_size - 1;
    const T* before = static_cast<const T*>(state.conv) + b * past * channels + first;
    const float* taps = m.taps + first;
    for (int64_t i = 0; i < n; i++)
      y[i] = to_float(from_float<T>(x[i])) * taps[past * channels + i];
    for (int64_t j = 0; j < past; j++)
      for (int64_t i = 0; i < n; i++)
        y[i] += to_float(before[j * channels + i]) * taps[j * channels + i];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = silu(y[i]);
    if (!writes || !past) return;
    T* after = static_cast<T*>(state.conv_after) + b * past * channels + first;
    for (int64_t j = 0; j + 1 < past; j++)
      memcpy(after + j * channels, before + (j + 1) * channels, n * sizeof(T));
    for (int64_t i = 0; i < n; i++) after[(past - 1) * channels + i] = from_float<T>(x[i]);
  }

  // --- MLA ------------------------------------------------------------------------------------

  // Into how many stretches a past of n tokens is cut: a function of n alone.
  static int64_t stretches(int64_t n) { return std::min<int64_t>(16, (n + 31) / 32); }

  template <class T>
  void attend(Thread& t, const Mla& m, const LayerState& state, const int64_t* past) {
    const Vector* x = prepare(t.a, t.normed, model_.dim, {&m.q, &m.latent});
    Rows& first = m.q_up.rows ? query_down_ : query_;
    multiply(t, {{m.q, x, into(first)}, {m.latent, x, into(latent_)}});
    meet(t);
    if (m.q_up.rows) {
      for (int64_t b = 0; b < batch_; b++)
        rms_norm(query_down_[b], m.query_norm, m.q.rows, m.norm_eps, t.query[b]);
      const Vector* v = prepare(t.a, t.query, m.q.rows, {&m.q_up});
      multiply(t, {{m.q_up, v, into(query_)}});
      meet(t);
    }

    const int64_t H = m.heads, L = m.latent_dim, P = m.rope_dim, S = state.capacity;
    T* latents = static_cast<T*>(state.latent);
    T* rope_keys = static_cast<T*>(state.rope_key);
    const Matrix& up = m.latent_up;
    for (int64_t i = t.begin(H + batch_); i < t.end(H + batch_); i++) {
      if (i < H) {  // the head's queries, moved to where the latents are
        for (int64_t b = 0; b < batch_; b++) {
          std::fill(q_latent_[b * H + i], q_latent_[b * H + i] + L, 0.f);
          const float* rope = query_[b] + i * m.query_dim() + m.nope_dim;
          rotate(m, past[b], rope, q_rope_[b * H + i]);
        }
        const Matrix keys = up.cut(i * (m.nope_dim + m.value_dim), m.nope_dim);
        auto move = [&](auto* w) {
          add_rows(w, m.nope_dim, L, L, query_[0] + i * m.query_dim(), query_.stride, batch_,
                   q_latent_[i], H * q_latent_.stride);
        };
        if (keys.kind == FP32) move(static_cast<const float*>(keys.values));
        else move(static_cast<const bf16*>(keys.values));
      } else {  // a row's new token, into the cache
        const int64_t b = i - H;
        float* latent = latent_[b];
        rms_norm(latent, m.latent_norm, L, m.latent_eps, latent);
        rotate(m, past[b], latent + L, latent + L);
        T *to = latents + (b * S + past[b]) * L, *key = rope_keys + (b * S + past[b]) * P;
        for (int64_t j = 0; j < L; j++) to[j] = from_float<T>(latent[j]);
        for (int64_t j = 0; j < P; j++) key[j] = from_float<T>(latent[L + j]);
      }
    }
    meet(t);

    int64_t units = 0, unit = 0;
    for (int64_t b = 0; b < batch_; b++) units += stretches(past[b] + 1);
    const int64_t begin = t.begin(units), end = t.end(units);
    for (int64_t b = 0; b < batch_; b++) {
      const int64_t n = past[b] + 1, count = stretches(n);
      for (int64_t i = 0; i < count; i++, unit++)
        if (unit >= begin && unit < end)
          stretch(t, m, latents + b * S * L, rope_keys + b * S * P, n * i / count,
                  n * (i + 1) / count, b, unit);
    }
    meet(t);

    for (int64_t h = t.begin(H); h < t.end(H); h++) {
      int64_t first_unit = 0;
      for (int64_t b = 0; b < batch_; b++) {
        const int64_t count = stretches(past[b] + 1);
        merge(m, h, first_unit, count, t.sources[b]);
        first_unit += count;
      }
      const Matrix values = up.cut(h * (m.nope_dim + m.value_dim) + m.nope_dim, m.value_dim);
      const Vector* v = prepare(t.a, t.sources, L, {});
      for (int64_t tile = 0; tile < values.tiles(); tile++) {
        tile_product(values, tile, v, batch_, t.tile.data());
        for (int64_t b = 0; b < batch_; b++)
          memcpy(attended_[b] + h * m.value_dim + tile * TILE, t.tile.data() + b * TILE,
                 rows_in(values, tile) * sizeof(float));
      }
    }
    meet(t);
    add_to_stream(t, m.o, attended_);
  }

  static void rotate(const Mla& m, int64_t position, const float* x, float* y) {
    if (!m.has_rope) {
      if (m.rope_dim && y != x) memcpy(y, x, m.rope_dim * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < m.rope_dim / 2; i++) {
      const float angle = float(position) * m.frequencies[i];
      const float cos = std::cos(angle), sin = std::sin(angle);
      const float even = x[2 * i], odd = x[2 * i + 1];
      y[2 * i] = even * cos - odd * sin;
      y[2 * i + 1] = even * sin + odd * cos;
    }
  }

  // All heads' attention to the tokens from `begin` to `end` of row b's past: for each head the
  // largest score, the sum of the weights relative to it, and the weighted sum of latents.
  template <class T>
  void stretch(Thread& t, const Mla& m, const T* latents, const T* rope_keys, int64_t begin,
               int64_t end, int64_t b, int64_t unit) {
    constexpr int64_t BLOCK = 64;  // tokens whose latents stay in the cache between the two uses
    const int64_t H = m.heads, L = m.latent_dim, P = m.rope_dim;
    const float scale = 1.f / std::sqrt(float(m.query_dim()));
    float *largest = largest_.data() + unit * H, *total = total_.data() + unit * H;
    for (int64_t h = 0; h < H; h++) {
      largest[h] = -INFINITY;
      total[h] = 0.f;
      std::fill(sources_[unit * H + h], sources_[unit * H + h] + L, 0.f);
    }
    t.scores.reserve(H, BLOCK);
    std::vector<Vector>& q = t.gathered;
    for (int64_t s = begin; s < end; s += BLOCK) {
      const int64_t n = std::min(BLOCK, end - s);
      const int64_t kind = sizeof(T) == 4 ? FP32 : BF16;
      const Matrix keys{latents + s * L, nullptr, n, L, kind};
      const Matrix rope{rope_keys + s * P, nullptr, n, P, kind};
      for (int64_t tile = 0; tile < keys.tiles(); tile++) {
        for (int64_t h = 0; h < H; h++) q[h] = {q_latent_[b * H + h], nullptr, nullptr, nullptr};
        tile_product(keys, tile, q.data(), H, t.tile.data());
        for (int64_t h = 0; h < H; h++) q[h].values = q_rope_[b * H + h];
        if (P) tile_product(rope, tile, q.data(), H, t.other_tile.data());
        for (int64_t h = 0; h < H; h++)
          for (int64_t i = 0; i < rows_in(keys, tile); i++) {
            const float by_rope = P ? t.other_tile[h * TILE + i] : 0.f;
            t.scores[h][tile * TILE + i] = (t.tile[h * TILE + i] + by_rope) * scale;
          }
      }
      for (int64_t h = 0; h < H; h++) {
        float* scores = t.scores[h];
        float most = largest[h];
        for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
        if (most != largest[h]) {
          const float shrink = exp_fast(largest[h] - most);
          total[h] *= shrink;
          float* sources = sources_[unit * H + h];
          for (int64_t i = 0; i < L; i++) sources[i] *= shrink;
          largest[h] = most;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) scores[i] = exp_fast(scores[i] - most);
        for (int64_t i = 0; i < n; i++) total[h] += scores[i];
      }
      add_rows(latents + s * L, n, L, L, t.scores[0], t.scores.stride, H, sources_[unit * H],
               sources_.stride);
    }
  }

  void merge(const Mla& m, int64_t h, int64_t first_unit, int64_t count, float* to) {
    float most = -INFINITY, total = 0.f;
    for (int64_t i = 0; i < count; i++)
      most = std::max(most, largest_[(first_unit + i) * m.heads + h]);
    std::fill(to, to + m.latent_dim, 0.f);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = (first_unit + i) * m.heads + h;
      const float by = exp_fast(largest_[at] - most), *sources = sources_[at];
      total += total_[at] * by;
      for (int64_t j = 0; j < m.latent_dim; j++) to[j] += sources[j] * by;
    }
    for (int64_t j = 0; j < m.latent_dim; j++) to[j] /= total;
  }

  // --- the channel ----------------------------------------------------------------------------

  void answer(Thread& t, const Channel& c) {
    const Vector* x = prepare(t.a, t.normed, model_.dim,
                              {&c.gate, &c.up, &c.router, &c.w_gate, &c.w_up});
    if (c.num_experts) multiply(t, {{c.router, x, into(router_)}});
    Rows& everyones = c.num_experts ? shared_hidden_ : hidden_;
    const int64_t tiles = c.up.tiles();
    for (int64_t tile = t.begin(tiles); tile < t.end(tiles); tile++)
      half_way(t, c.gate, c.up, tile, x, batch_, [&](int64_t b) { return everyones[b]; });
    meet(t);
    if (c.num_experts) {
      route(c, t.routes);
      visit_experts(t, c, x);
      meet(t);
    }

    const int64_t outputs = (model_.dim + TILE - 1) / TILE;
    const int64_t begin = t.begin(outputs), end = t.end(outputs);
    const int64_t first = begin * TILE, last = std::min(end * TILE, model_.dim);
    for (int64_t b = 0; b < batch_ && first < last; b++)
      std::fill(answer_[b] + first, answer_[b] + last, 0.f);
    if (c.num_experts) {
      const int64_t A = c.experts_per_token;
      const Vector* hidden =
          prepare(t.a, expert_hidden_, c.w_up.rows, {&c.w_down}, batch_ * A);
      const Routes& r = t.routes;
      for (size_t e = 0; e < r.experts.size(); e++) {
        const int64_t* members = r.members.data() + r.starts[e];
        const int64_t count = r.starts[e + 1] - r.starts[e];
        for (int64_t i = 0; i < count; i++) t.gathered[i] = hidden[members[i]];
        const Matrix down = c.w_down.at(r.experts[e]);
        for (int64_t tile = begin; tile < end; tile++) {
          tile_product(down, tile, t.gathered.data(), count, t.tile.data());
          for (int64_t i = 0; i < count; i++) {
            float* to = answer_[members[i] / A] + tile * TILE;
            for (int64_t j = 0; j < rows_in(down, tile); j++)
              to[j] += r.weights[members[i]] * t.tile[i * TILE + j];
          }
        }
      }
    }
    if (c.down.rows) {
      const Vector* hidden = prepare(t.b, everyones, c.down.columns, {&c.down});
      for (int64_t tile = begin; tile < end; tile++) {
        tile_product(c.down, tile, hidden, batch_, t.tile.data());
        for (int64_t b = 0; b < batch_; b++)
          for (int64_t j = 0; j < rows_in(c.down, tile); j++)
            answer_[b][tile * TILE + j] += t.tile[b * TILE + j];
      }
    }
    for (int64_t b = 0; b < batch_; b++)
      for (int64_t i = first; i < last; i++) x_[b][i] += answer_[b][i];
    meet(t);
  }

  // A tile of an expert's hidden vector for `count` inputs; row i goes to to(i).
  template <class To>
  void half_way(Thread& t, const Matrix& gate, const Matrix& up, int64_t tile, const Vector* x,
                int64_t count, To to) {
    float *by_up = t.tile.data(), *by_gate = t.other_tile.data();
    tile_product(up, tile, x, count, by_up);
    const int64_t rows = rows_in(up, tile);
    if (gate.rows) {
      tile_product(gate, tile, x, count, by_gate);
      for (int64_t i = 0; i < count; i++) {
        float* y = to(i) + tile * TILE;
#pragma omp simd
        for (int64_t j = 0; j < rows; j++)
          y[j] = silu(by_gate[i * TILE + j]) * by_up[i * TILE + j];
      }
    } else {
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < rows; j++) {
          const float u = by_up[i * TILE + j];
          to(i)[tile * TILE + j] = 0.5f * u * (1.f + std::erf(u * 0.70710678f));
        }
    }
  }

  void visit_experts(Thread& t, const Channel& c, const Vector* x) {
    const Routes& r = t.routes;
    const int64_t A = c.experts_per_token, tiles = c.w_up.tiles();
    const int64_t units = int64_t(r.experts.size()) * tiles;
    const int64_t end = t.end(units);
    for (int64_t unit = t.begin(units); unit < end;) {
      const int64_t e = unit / tiles;
      const int64_t* members = r.members.data() + r.starts[e];
      const int64_t count = r.starts[e + 1] - r.starts[e];
      for (int64_t i = 0; i < count; i++) t.gathered[i] = x[members[i] / A];
      const Matrix gate = c.w_gate.rows ? c.w_gate.at(r.experts[e]) : c.w_gate;
      const Matrix up = c.w_up.at(r.experts[e]);
      for (; unit < end && unit / tiles == e; unit++)
        half_way(t, gate, up, unit % tiles, t.gathered.data(), count,
                 [&](int64_t i) { return expert_hidden_[members[i]]; });
    }
  }

  // As layers/router.py: the best first, ties to the lower index.
  void route(const Channel& c, Routes& r) {
    const int64_t E = c.num_experts, A = c.experts_per_token;
    r.ids.resize(batch_ * A);
    r.weights.resize(batch_ * A);
    r.preference.resize(2 * E);
    float *preference = r.preference.data(), *scores = preference + E;
    for (int64_t b = 0; b < batch_; b++) {
      float* weights = r.weights.data() + b * A;
      std::copy(router_[b], router_[b] + E, scores);
      if (c.scoring == BY_SOFTMAX) softmax(scores, E);
      if (c.scoring == BY_SIGMOID)
        for (int64_t e = 0; e < E; e++) scores[e] = 1.f / (1.f + std::exp(-scores[e]));
      for (int64_t e = 0; e < E; e++) preference[e] = scores[e] + (c.bias ? c.bias[e] : 0.f);
      if (c.num_groups > 1) close_groups(c, preference);
      for (int64_t a = 0; a < A; a++) {
        const int64_t best = std::max_element(preference, preference + E) - preference;
        r.ids[b * A + a] = best;
        weights[a] = scores[best] + (c.weighs_with_bias ? c.bias[best] : 0.f);
        preference[best] = -INFINITY;
      }
      if (c.scoring == BY_TOPK_SOFTMAX) {
        softmax(weights, A);
      } else if (c.renormalizes && A > 1) {
        float total = 0.f;
        for (int64_t a = 0; a < A; a++) total += weights[a];
        for (int64_t a = 0; a < A; a++) weights[a] /= total + 1e-20f;
      }
      for (int64_t a = 0; a < A; a++) weights[a] *= float(c.routed_scale);
    }
    group_by_expert(r);
  }

  static void softmax(float* x, int64_t n) {
    const float most = *std::max_element(x, x + n);
    float total = 0.f;
    for (int64_t i = 0; i < n; i++) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < n; i++) x[i] /= total;
  }

  // Only the groups whose best two experts together are preferred stay open.
  static void close_groups(const Channel& c, float* preference) {
    const int64_t size = c.num_experts / c.num_groups;
    std::vector<float> best_two(c.num_groups);
    for (int64_t g = 0; g < c.num_groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int64_t i = g * size; i < (g + 1) * size; i++) {
        if (preference[i] > first) second = first, first = preference[i];
        else if (preference[i] > second) second = preference[i];
      }
      best_two[g] = size > 1 ? first + second : first;
    }
    std::vector<bool> is_open(c.num_groups);
    for (int64_t i = 0; i < c.groups_per_token; i++) {
      int64_t best = -1;
      for (int64_t g = 0; g < c.num_groups; g++)
        if (!is_open[g] && (best < 0 || best_two[g] > best_two[best])) best = g;
      is_open[best] = true;
    }
    for (int64_t e = 0; e < c.num_experts; e++)
      if (!is_open[e / size]) preference[e] = -INFINITY;
  }

  static void group_by_expert(Routes& r) {
    r.members.resize(r.ids.size());
    for (size_t i = 0; i < r.ids.size(); i++) r.members[i] = int64_t(i);
    std::stable_sort(r.members.begin(), r.members.end(),
                     [&](int64_t i, int64_t j) { return r.ids[i] < r.ids[j]; });
    r.experts.clear();
    r.starts.clear();
    for (size_t i = 0; i < r.members.size(); i++) {
      const int64_t expert = r.ids[r.members[i]];
      if (r.experts.empty() || r.experts.back() != expert) {
        r.experts.push_back(expert);
        r.starts.push_back(int64_t(i));
      }
    }
    r.starts.push_back(int64_t(r.members.size()));
  }
};

}  // namespace

// Bytes of the three structs, for the caller to compare with its own.
EXPORT void decoder_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Model);
  sizes[1] = sizeof(Layer);
  sizes[2] = sizeof(LayerState);
}

// The description is copied; weights are read where they lie, and must stay there.
EXPORT void* decoder_new(const Model* model) { return new Decoder(*model); }

EXPORT void decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Read ids [B], one a row, of which row b has read past[b] before; logits [B, vocab].
EXPORT void decoder_step(void* decoder, const int64_t* ids, int64_t batch, const int64_t* past,
                         const LayerState* states, float* logits, int threads) {
  static_cast<Decoder*>(decoder)->step(ids, batch, past, states, logits, threads);
}
