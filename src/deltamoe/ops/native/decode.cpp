// One token of every row through a whole model: what model/decoder.py calls once a token.
//
// A step is a row of phases with a barrier between them. In a phase each thread does its share of
// tiles of outputs, of heads, or of stretches of the attention's past; every matrix is read once,
// whatever the number of rows, and of the experts only those that some row chose. What is small
// (norms, the routing, rounding to 8 bits) every thread does for itself, which is cheaper than one
// more barrier; of many rows it does a share, but each packs all of them for AMX. Activations and
// sums are fp32 for every kind of weight, on AMX too, which gets the activations in parts. Neither
// the number of threads nor the rows beside a row change a bit of its results.
//
// The memory's step is that of ops/kda/reference.py, attention the absorbed form of ops/mla.py.

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "decode_math.h"
#include "decode_routing.h"
#include "team.h"

namespace {

constexpr int64_t LARGE = 1 << 20;  // bytes of all layers' memories
constexpr int64_t MANY = 4;         // rows
constexpr int64_t CHANNELS = 128;   // of the convolution, at a time
constexpr int64_t LINE = 16;        // numbers of a cache line
constexpr int64_t BLOCK = 32;       // tokens of the past, at a time

struct Target {  // y[b] begins at p + b * stride
  float* p;
  int64_t stride;
};
Target into(Rows& rows) { return {rows[0], rows.stride}; }

struct Job {
  const Matrix& matrix;
  Vectors x;
  Target to;
};

struct Thread {
  int me = 0, all = 1;
  Rows normed, q, k, v, retained, out, memory_before, memory_after, scores, sources;
  std::vector<Vector> vectors[2], gathered;
  Rounded rounded[2];
  Room<bf16> parts[3];
  Room<char> latents, rope_keys;
  Room<float> tile, other_tile;
  Choices choices;
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

  void step(const Batch& batch, const LayerState* states, float* logits, int threads) {
    rows_ = batch;
    batch_ = batch.rows;
    reserve(batch.rows, batch.past, threads);
    team_.run(threads, [&](int me) {
      Thread& t = threads_[me];
      t.me = me;
      t.all = threads;
      const Tiles tiles(amx_granted());
      run(t, states, logits);
    });
  }

 private:
  Model model_;
  std::vector<Layer> layers_;
  Batch rows_ = {};
  int64_t batch_ = 0;
  bool streams_ = false, shares_ = false;
  std::vector<Thread> threads_;
  Team team_;
  Rows x_, normed_, answer_;
  Rounded rounded_[2];
  Choices choices_;
  Rows q_, k_, v_, decay_down_, decay_, beta_, gate_down_, gate_, mixed_;
  Rows query_down_, query_, latent_, q_latent_, q_rope_, sources_, attended_;
  Rows hidden_, shared_hidden_, router_, expert_hidden_;
  Room<float> largest_, total_;

  void meet(const Thread& t) { team_.meet(t.all); }

  void reserve(int64_t batch, const int64_t* past, int threads) {
    const int64_t dim = model_.dim;
    int64_t heads = 1, chosen = 1, remembered = 0, widest = dim, rounded = batch * padded(dim);
    shares_ = threads > 1 && batch >= MANY;
    x_.reserve(batch, dim);
    answer_.reserve(batch, dim);
    for (const Layer& layer : layers_) {
      const Channel& c = layer.channel;
      if (layer.is_mla) {
        const Mla& m = layer.mla;
        heads = std::max(heads, m.heads);
        if (m.q_up.rows) {
          query_down_.reserve(batch, m.q.rows);
          widest = std::max(widest, m.q.rows);
        }
        query_.reserve(batch, m.heads * m.query_dim());
        latent_.reserve(batch, m.latent_dim + m.rope_dim);
        q_latent_.reserve(batch * m.heads, m.latent_dim);
        q_rope_.reserve(batch * m.heads, m.rope_dim);
        int64_t units = 0;
        for (int64_t b = 0; b < batch; b++) units += stretches(past[b] + 1);
        // A line more: tiles of rows that lie 4 KiB apart would wait for each other's stores.
        sources_.reserve(units * source_rows(m), m.latent_dim, LINE);
        if (int64_t(largest_.size()) < units * m.heads) {
          largest_.resize(units * m.heads);
          total_.resize(units * m.heads);
        }
        attended_.reserve(batch, m.heads * m.value_dim);
        rounded = std::max(rounded, batch * attended_.stride);
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
        rounded = std::max({rounded, batch * mixed_.stride, batch * decay_down_.stride,
                            batch * gate_down_.stride});
        remembered += batch * m.value_heads * m.key_dim * m.value_dim;
      }
      Rows& everyones = c.num_experts ? shared_hidden_ : hidden_;
      everyones.reserve(batch, c.up.rows);
      rounded = std::max(rounded, batch * everyones.stride);
      if (c.num_experts) {
        router_.reserve(batch, c.num_experts);
        expert_hidden_.reserve(batch * c.experts_per_token, c.w_up.rows);
        chosen = std::max(chosen, c.experts_per_token);
        rounded = std::max(rounded, batch * c.experts_per_token * expert_hidden_.stride);
      }
    }
    streams_ = remembered * int64_t(sizeof(float)) > LARGE;
    if (int(threads_.size()) < threads) threads_.resize(threads);
    if (shares_) {
      normed_.reserve(batch, widest);
      choices_.reserve(batch * chosen);
      for (Rounded& room : rounded_) room.reserve(std::max(rounded, batch * padded(widest)));
    }
    const int64_t most = std::max(batch * chosen, heads);
    for (Thread& t : threads_) {
      if (!shares_) t.normed.reserve(batch, widest);
      t.sources.reserve(batch, q_latent_.stride);
      if (int64_t(t.tile.size()) < most * TILE) {
        t.tile.resize(most * TILE);
        t.other_tile.resize(most * TILE);
        t.gathered.resize(most);
      }
    }
  }

  void run(Thread& t, const LayerState* states, float* logits) {
    if (t.me == 0)
      for (int64_t b = 0; b < batch_; b++) read_row(model_.embedding, rows_.ids[b], x_[b]);
    meet(t);
    for (int64_t i = 0; i < model_.num_layers; i++) {
      const Layer& layer = layers_[i];
      if (layer.is_mla) {
        if (model_.state_kind == BF16) attend<bf16>(t, layer, states[i]);
        else attend<float>(t, layer, states[i]);
      } else {
        if (model_.state_kind == BF16) remember<bf16>(t, layer, states[i]);
        else remember<float>(t, layer, states[i]);
      }
      answer(t, layer, i);
    }
    const Vectors x = normalize(t, x_, model_.norm, model_.dim, model_.norm_eps, {&model_.head});
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

  using Readers = std::initializer_list<const Matrix*>;

  // Of few rows every thread makes its own copy; of many each makes a share of everyone's.
  Vectors normalize(Thread& t, Rows& from, const float* weight, int64_t width, double eps,
                    Readers readers) {
    Rows& to = shares_ ? normed_ : t.normed;
    const auto [begin, end] = my_rows(t, batch_);
    for (int64_t b = begin; b < end; b++) {
      rms_norm(from[b], weight, width, eps, to[b]);
      std::fill(to[b] + width, to[b] + padded(width), 0.f);
    }
    const Vector* made = set_vectors(t, 0, to, width, readers, batch_);
    if (shares_) meet(t);
    return with_parts(t, 0, made, batch_, readers);
  }

  // What was made by all is readied for products. Two may be in use at a time.
  Vectors prepare(Thread& t, int use, Rows& rows, int64_t width, Readers readers) {
    const Vector* made = round(t, use, rows, width, readers, batch_);
    return with_parts(t, use, made, batch_, readers);
  }

  std::pair<int64_t, int64_t> my_rows(const Thread& t, int64_t count) const {
    if (!shares_) return {0, count};
    return {t.begin(count), t.end(count)};
  }

  static bool are_quantized(Readers matrices) {
    for (const Matrix* m : matrices)
      if (m->rows && m->is_quantized()) return true;
    return false;
  }

  const Vector* round(Thread& t, int use, Rows& rows, int64_t width, Readers readers,
                      int64_t count) {
    const Vector* made = set_vectors(t, use, rows, width, readers, count);
    if (shares_ && are_quantized(readers)) meet(t);
    return made;
  }

  // Point at vectors, and round this thread's rows if a matrix needs that.
  const Vector* set_vectors(Thread& t, int use, Rows& rows, int64_t width, Readers readers,
                            int64_t count) {
    const int64_t stride = padded(width), groups = stride / GROUP;
    Rounded& to = shares_ ? rounded_[use] : t.rounded[use];
    std::vector<Vector>& vectors = t.vectors[use];
    const bool rounds = are_quantized(readers);
    if (rounds) to.reserve(count * stride);
    if (int64_t(vectors.size()) < count) vectors.resize(count);
    int8_t* codes = to.codes.data();
    float* scales = to.scales.data();
    int32_t* sums = to.sums.data();
    for (int64_t i = 0; i < count; i++)
      vectors[i] = {rows[i], codes + i * stride, scales + i * groups, sums + i * groups};
    const auto [begin, end] = my_rows(t, rounds ? count : 0);
    for (int64_t i = begin; i < end; i++)
      quantize(rows[i], width, codes + i * stride, scales + i * groups, sums + i * groups);
    return vectors.data();
  }

  // And their parts, if a matrix needs them.
  static Vectors with_parts(Thread& t, int use, const Vector* x, int64_t count, Readers readers) {
    for (const Matrix* m : readers) {
      if (!is_for_tiles(*m)) continue;
      const int64_t size = parts_size(count, m->columns);
      if (int64_t(t.parts[use].size()) < size) t.parts[use].resize(size);
      pack_parts(x, count, m->columns, t.parts[use].data());
      return {x, count, t.parts[use].data()};
    }
    return {x, count};
  }

  // Every job's matrix times its vectors; threads share the tiles of all.
  void multiply(Thread& t, std::initializer_list<Job> jobs) {
    int64_t tiles = 0, base = 0;
    for (const Job& job : jobs) tiles += job.matrix.tiles();
    const int64_t begin = t.begin(tiles), end = t.end(tiles);
    for (const Job& job : jobs) {
      const Matrix& m = job.matrix;
      const int64_t stop = std::min(end - base, m.tiles());
      const bool continues = end - base > m.tiles();  // in the next job
      for (int64_t tile = std::max<int64_t>(begin - base, 0); tile < stop; tile++) {
        const int64_t later = tile + m.lead();
        const void* next = later < stop ? m.tile(later) : nullptr;
        if (continues && later >= stop) next = (&job + 1)->matrix.tile(later - stop);
        tile_product(m, tile, job.x, t.tile.data(), next);
        for (int64_t b = 0; b < batch_; b++)
          memcpy(job.to.p + b * job.to.stride + tile * TILE, t.tile.data() + b * TILE,
                 rows_in(m, tile) * sizeof(float));
      }
      base += m.tiles();
    }
  }

  // x += matrix times what the mixer made.
  void add_to_stream(Thread& t, const Matrix& m, Rows& from) {
    const Vectors v = prepare(t, 0, from, m.columns, {&m});
    const int64_t end = t.end(m.tiles());
    for (int64_t tile = t.begin(m.tiles()); tile < end; tile++) {
      const int64_t later = tile + m.lead();
      tile_product(m, tile, v, t.tile.data(), later < end ? m.tile(later) : nullptr);
      for (int64_t b = 0; b < batch_; b++)
        for (int64_t i = 0; i < rows_in(m, tile); i++)
          x_[b][tile * TILE + i] += t.tile[b * TILE + i];
    }
    meet(t);
  }

  // --- KDA ------------------------------------------------------------------------------------

  template <class T>
  void remember(Thread& t, const Layer& layer, const LayerState& state) {
    const Kda& m = layer.kda;
    const Vectors x = normalize(t, x_, layer.mixer_norm, model_.dim, model_.norm_eps,
                                {&m.q, &m.k, &m.v, &m.decay_down, &m.beta, &m.gate_down});
    multiply(t, {{m.q, x, into(q_)},
                 {m.k, x, into(k_)},
                 {m.v, x, into(v_)},
                 {m.decay_down, x, into(decay_down_)},
                 {m.beta, x, into(beta_)},
                 {m.gate_down, x, into(gate_down_)}});
    meet(t);
    const Vectors decay = prepare(t, 0, decay_down_, m.decay_down.rows, {&m.decay_up});
    const Vectors gate = prepare(t, 1, gate_down_, m.gate_down.rows, {&m.gate_up});
    multiply(t, {{m.decay_up, decay, into(decay_)}, {m.gate_up, gate, into(gate_)}});
    convolve<T>(t, m, state);
    meet(t);
    t.q.reserve(1, m.key_dim);
    t.k.reserve(1, m.key_dim);
    t.retained.reserve(1, m.key_dim);
    t.out.reserve(1, m.value_dim);
    const int64_t units = batch_ * m.value_heads;
    for (int64_t i = t.begin(units); i < t.end(units); i++)
      head(t, m, state, i / m.value_heads, i % m.value_heads);
    if (streams_) finish_stores_past_caches();
    meet(t);
    add_to_stream(t, m.o, mixed_);
  }

  void head(Thread& t, const Kda& m, const LayerState& state, int64_t b, int64_t h) {
    const int64_t K = m.key_dim, V = m.value_dim, group = m.value_heads / m.heads;
    const int64_t key_head = h / group;
    float *q = t.q[0], *k = t.k[0], *v = v_[b] + h * V, *retained = t.retained[0], *out = t.out[0];
    memcpy(q, q_[b] + key_head * K, K * sizeof(float));
    memcpy(k, k_[b] + key_head * K, K * sizeof(float));
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

    const int64_t at = h * K * V;
    const float* before = state.memory + rows_.slots_before[b] * state.memory_stride + at;
    float* after = state.memory_after + rows_.slots_after[b] * state.memory_stride + at;
    if (V % LANES == 0) {
      const bool is_aligned = reinterpret_cast<uintptr_t>(after) % 64 == 0;
      auto step = streams_ && is_aligned && before != after ? delta_step<true> : delta_step<false>;
      step(K, V, before, after, retained, q, k, v, beta, out);
    } else {  // through copies with rows of whole vectors
      const int64_t wide = padded(V);
      t.memory_before.reserve(K, V);
      t.memory_after.reserve(K, V);
      t.v.reserve(1, V);
      memcpy(t.v[0], v, V * sizeof(float));
      for (int64_t i = 0; i < K; i++)
        memcpy(t.memory_before[i], before + i * V, V * sizeof(float));
      delta_step<false>(K, wide, t.memory_before[0], t.memory_after[0], retained, q, k, t.v[0],
                        beta, out);
      for (int64_t i = 0; i < K; i++)
        memcpy(after + i * V, t.memory_after[i], V * sizeof(float));
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

  // The short convolution of q, k and v, in place; threads share blocks of channels.
  template <class T>
  void convolve(Thread& t, const Kda& m, const LayerState& state) {
    const int64_t keys = m.heads * m.key_dim, values = m.value_heads * m.value_dim;
    const auto blocks = [](int64_t width) { return (width + CHANNELS - 1) / CHANNELS; };
    const int64_t all = 2 * blocks(keys) + blocks(values);
    for (int64_t i = t.begin(all); i < t.end(all); i++) {
      const int64_t part = std::min<int64_t>(i / blocks(keys), 2);
      const int64_t first = (i - part * blocks(keys)) * CHANNELS;
      const int64_t n = std::min(CHANNELS, (part == 2 ? values : keys) - first);
      Rows& x = part == 0 ? q_ : part == 1 ? k_ : v_;
      for (int64_t b = 0; b < batch_; b++)
        convolve(m, part * keys + first, n,
                 static_cast<const T*>(state.conv) + rows_.slots_before[b] * state.conv_stride,
                 static_cast<T*>(state.conv_after) + rows_.slots_after[b] * state.conv_stride,
                 x[b] + first);
    }
  }

  // n channels from `first`; `before` and `after` may be the same.
  template <class T>
  static void convolve(const Kda& m, int64_t first, int64_t n, const T* before, T* after,
                       float* x) {
    const int64_t channels = m.channels(), past = m.conv_size - 1;
    float y[CHANNELS];
    if (!m.conv_size) memcpy(y, x, n * sizeof(float));
    for (int64_t i = 0; past >= 0 && i < n; i++)
      y[i] = to_float(from_float<T>(x[i])) * m.taps[past * channels + first + i];
    for (int64_t j = 0; j < past; j++) {
      const T* earlier = before + j * channels + first;
      const float* taps = m.taps + j * channels + first;
      for (int64_t i = 0; i < n; i++) y[i] += to_float(earlier[i]) * taps[i];
      if (j) memmove(after + (j - 1) * channels + first, earlier, n * sizeof(T));
    }
    for (int64_t i = 0; past > 0 && i < n; i++)
      after[(past - 1) * channels + first + i] = from_float<T>(x[i]);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = silu(y[i]);
  }

  // --- MLA ------------------------------------------------------------------------------------

  // Into how many stretches of whole blocks a past of n tokens is cut: a function of n alone.
  static int64_t stretches(int64_t n) { return std::min<int64_t>(16, (n + BLOCK - 1) / BLOCK); }
  static int64_t stretch_begin(int64_t n, int64_t i) {
    return std::min(n, (n + BLOCK - 1) / BLOCK * i / stretches(n) * BLOCK);
  }

  bool are_on_tiles(const Mla& m) const {
    return is_for_tiles({nullptr, nullptr, BLOCK, m.latent_dim, model_.state_kind});
  }
  // Rows of `sources_` that a stretch has: its heads', and on tiles as many as they fill.
  int64_t source_rows(const Mla& m) const {
    return are_on_tiles(m) ? part_groups(m.heads) * part_rows(m.heads) : m.heads;
  }

  template <class T>
  void attend(Thread& t, const Layer& layer, const LayerState& state) {
    const Mla& m = layer.mla;
    const int64_t* past = rows_.past;
    const Vectors x = normalize(t, x_, layer.mixer_norm, model_.dim, model_.norm_eps,
                                {&m.q, &m.latent});
    Rows& first = m.q_up.rows ? query_down_ : query_;
    multiply(t, {{m.q, x, into(first)}, {m.latent, x, into(latent_)}});
    meet(t);
    if (m.q_up.rows) {
      const Vectors v =
          normalize(t, query_down_, m.query_norm, m.q.rows, m.norm_eps, {&m.q_up});
      multiply(t, {{m.q_up, v, into(query_)}});
      meet(t);
    }

    const int64_t H = m.heads, L = m.latent_dim, P = m.rope_dim;
    const Matrix& up = m.latent_up;
    for (int64_t h = t.begin(H); h < t.end(H); h++) {  // its queries, to where the latents are
      for (int64_t b = 0; b < batch_; b++) {
        std::fill(q_latent_[b * H + h], q_latent_[b * H + h] + L, 0.f);
        const float* rope = query_[b] + h * m.query_dim() + m.nope_dim;
        rotate(m, past[b], rope, q_rope_[b * H + h]);
      }
      const Matrix keys = up.cut(h * (m.nope_dim + m.value_dim), m.nope_dim);
      auto move = [&](auto* w) {
        add_rows(w, m.nope_dim, L, L, query_[0] + h * m.query_dim(), query_.stride, batch_,
                 q_latent_[h], H * q_latent_.stride, 8 * L * int64_t(sizeof *w));
      };
      if (keys.kind == FP32) move(static_cast<const float*>(keys.values));
      else move(static_cast<const bf16*>(keys.values));
    }
    for (int64_t b = t.begin(batch_); b < t.end(batch_); b++) {  // the new token, into the cache
      float* latent = latent_[b];
      rms_norm(latent, m.latent_norm, L, m.latent_eps, latent);
      rotate(m, past[b], latent + L, latent + L);
      T* to = token<T>(state.latent, state.latent_stride, L, b, past[b]);
      T* key = token<T>(state.rope_key, state.rope_key_stride, P, b, past[b]);
      for (int64_t j = 0; j < L; j++) to[j] = from_float<T>(latent[j]);
      for (int64_t j = 0; j < P; j++) key[j] = from_float<T>(latent[L + j]);
    }
    meet(t);

    int64_t units = 0, unit = 0;
    for (int64_t b = 0; b < batch_; b++) units += stretches(past[b] + 1);
    const int64_t begin = t.begin(units), end = t.end(units);
    for (int64_t b = 0; b < batch_; b++) {
      const int64_t n = past[b] + 1, count = stretches(n);
      for (int64_t i = 0; i < count; i++, unit++)
        if (unit >= begin && unit < end)
          stretch<T>(t, m, state, stretch_begin(n, i), stretch_begin(n, i + 1), b, unit);
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
      const Vectors v =
          with_parts(t, 0, set_vectors(t, 0, t.sources, L, {}, batch_), batch_, {&values});
      for (int64_t tile = 0; tile < values.tiles(); tile++) {
        tile_product(values, tile, v, t.tile.data(), values.tile(tile + 1));
        for (int64_t b = 0; b < batch_; b++)
          memcpy(attended_[b] + h * m.value_dim + tile * TILE, t.tile.data() + b * TILE,
                 rows_in(values, tile) * sizeof(float));
      }
    }
    meet(t);
    add_to_stream(t, m.o, attended_);
  }

  // Where row b's token is.
  template <class T>
  T* token(void* pages, int64_t stride, int64_t width, int64_t b, int64_t position) const {
    const int64_t page = rows_.pages[b * rows_.max_pages + position / rows_.page_tokens];
    return static_cast<T*>(pages) + page * stride + position % rows_.page_tokens * width;
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
  void stretch(Thread& t, const Mla& m, const LayerState& state, int64_t begin, int64_t end,
               int64_t b, int64_t unit) {
    const int64_t H = m.heads, L = m.latent_dim, P = m.rope_dim;
    const int64_t kind = sizeof(T) == 4 ? FP32 : BF16;
    const bool on_tiles = are_on_tiles(m);
    const float scale = 1.f / std::sqrt(float(m.query_dim()));
    float *largest = largest_.data() + unit * H, *total = total_.data() + unit * H;
    float* sources = sources_[unit * source_rows(m)];
    std::fill(sources, sources + source_rows(m) * sources_.stride, 0.f);
    std::vector<Vector>&q = t.gathered, &q_rope = t.vectors[1];
    if (int64_t(q_rope.size()) < H) q_rope.resize(H);
    for (int64_t h = 0; h < H; h++) {
      largest[h] = -INFINITY;
      total[h] = 0.f;
      q[h] = {q_latent_[b * H + h], nullptr, nullptr, nullptr};
      q_rope[h] = {q_rope_[b * H + h], nullptr, nullptr, nullptr};
    }
    Matrix keys{nullptr, nullptr, BLOCK, L, kind}, rope{nullptr, nullptr, BLOCK, P, kind};
    const Vectors by_latent = with_parts(t, 0, q.data(), H, {&keys});
    const Vectors by_rope = with_parts(t, 1, q_rope.data(), H, {&rope});
    if (on_tiles) t.parts[2].resize(source_rows(m) * PARTS * BLOCK);
    t.scores.reserve(H, BLOCK);
    // Sums want tiles 0 to 2 with as many rows as a group has; products with many heads want all
    // with 16, those with few leave these three alone.
    const int low = int(part_rows(H));
    const bool are_few = on_tiles && part_tiles(H) == 1 && P % 32 == 0;
    const bool alternates = on_tiles && !are_few && low < TILE;
    if (are_few) configure_tiles(low);
    for (int64_t s = begin; s < end; s += BLOCK) {
      const int64_t n = std::min(BLOCK, end - s);
      const T* latents = block<T>(t.latents, state.latent, state.latent_stride, L, b, s, n);
      keys.values = latents;
      rope.values = block<T>(t.rope_keys, state.rope_key, state.rope_key_stride, P, b, s, n);
      // Meanwhile the next block is asked for: half of its latents with each of the two uses, on
      // tiles the first half first, and its shared keys with these.
      const int64_t next = s + BLOCK > rows_.past[b] ? s : s + BLOCK;
      const char* next_latents = reinterpret_cast<const char*>(
          token<T>(state.latent, state.latent_stride, L, b, next));
      const char* next_rope = reinterpret_cast<const char*>(
          token<T>(state.rope_key, state.rope_key_stride, P, b, next));
      const int64_t to_next = next_latents - reinterpret_cast<const char*>(latents);
      const int64_t to_next_rope = next_rope - static_cast<const char*>(rope.values);
      const int64_t half = BLOCK / 2 * L * int64_t(sizeof(T));
      if constexpr (sizeof(T) == 2)
        if (are_few) {
          const PartRows products[] = {
              {latents, L, by_latent.parts, {next_latents, half}},
              {static_cast<const T*>(rope.values), P, by_rope.parts,
               {next_rope, BLOCK * P * int64_t(sizeof(T))}}};
          multiply_two_tiles(products, P ? 2 : 1, H, t.scores[0], t.scores.stride);
          for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < BLOCK; i++) t.scores[h][i] *= scale;
        }
      if (alternates) configure_tiles();
      for (int64_t tile = 0; !are_few && tile * TILE < n; tile++) {
        const void* ahead = keys.tile(tile) + to_next;
        if (on_tiles) ahead = tile ? nullptr : next_latents;
        tile_product(keys, tile, by_latent, t.tile.data(), ahead, on_tiles ? Turn{} : Turn{0, 2});
        if (P)
          tile_product(rope, tile, by_rope, t.other_tile.data(), rope.tile(tile) + to_next_rope);
        for (int64_t h = 0; h < H; h++)
          for (int64_t i = 0; i < TILE; i++)
            t.scores[h][tile * TILE + i] =
                (t.tile[h * TILE + i] + (P ? t.other_tile[h * TILE + i] : 0.f)) * scale;
      }
      for (int64_t h = 0; h < H; h++)
        weigh(t.scores[h], n, largest[h], total[h], sources + h * sources_.stride, L);
      if constexpr (sizeof(T) == 2)
        if (on_tiles) {
          if (alternates) configure_tiles(low);
          add_parts(latents, L, t.scores[0], t.scores.stride, H, sources, sources_.stride,
                    {next_latents + half, half}, t.parts[2].data());
          continue;
        }
      add_rows(latents, n, L, L, t.scores[0], t.scores.stride, H, sources, sources_.stride,
               to_next, {1, 2});
    }
    if (on_tiles && low < TILE) configure_tiles();
  }

  // A block's scores become weights relative to the largest score so far; what was summed before is
  // rescaled to it.
  static void weigh(float* scores, int64_t n, float& largest, float& total, float* sources,
                    int64_t width) {
    std::fill(scores + n, scores + BLOCK, -INFINITY);
    vec mosts = splat(largest), sums = {};
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      const vec here = load(scores + i);
      mosts = here > mosts ? here : mosts;
    }
    float most = mosts[0];
    for (int i = 1; i < LANES; i++) most = mosts[i] > most ? mosts[i] : most;
    if (most != largest) {
      const float shrink = exp_fast(largest - most);
      total *= shrink;
      for (int64_t i = 0; i < width; i++) sources[i] *= shrink;
      largest = most;
    }
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      const vec weights = exp_lanes(load(scores + i) - splat(most));
      store(scores + i, weights);
      sums += weights;
    }
    total += sum(sums);
  }

  // A block's n tokens from `first` where they lie together, followed by zeros if they are few.
  template <class T>
  const T* block(Room<char>& room, void* pages, int64_t stride, int64_t width, int64_t b,
                 int64_t first, int64_t n) const {
    const int64_t size = rows_.page_tokens, bytes = width * sizeof(T);
    if (n == BLOCK && first % size + n <= size) return token<T>(pages, stride, width, b, first);
    room.assign(BLOCK * bytes, 0);
    for (int64_t i = 0; i < n; i++)
      memcpy(room.data() + i * bytes, token<T>(pages, stride, width, b, first + i), bytes);
    return reinterpret_cast<const T*>(room.data());
  }

  void merge(const Mla& m, int64_t h, int64_t first_unit, int64_t count, float* to) {
    float most = -INFINITY, total = 0.f;
    for (int64_t i = 0; i < count; i++)
      most = std::max(most, largest_[(first_unit + i) * m.heads + h]);
    std::fill(to, to + m.latent_dim, 0.f);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = (first_unit + i) * m.heads + h;
      const float by = exp_fast(largest_[at] - most);
      const float* sources = sources_[(first_unit + i) * source_rows(m) + h];
      total += total_[at] * by;
      for (int64_t j = 0; j < m.latent_dim; j++) to[j] += sources[j] * by;
    }
    for (int64_t j = 0; j < m.latent_dim; j++) to[j] /= total;
  }

  // --- the channel ----------------------------------------------------------------------------

  void answer(Thread& t, const Layer& layer, int64_t index) {
    const Channel& c = layer.channel;
    const Vectors x = normalize(t, x_, layer.channel_norm, model_.dim, model_.norm_eps,
                                {&c.gate, &c.up, &c.router, &c.w_gate, &c.w_up});
    if (c.num_experts) multiply(t, {{c.router, x, into(router_)}});
    Rows& everyones = c.num_experts ? shared_hidden_ : hidden_;
    const int64_t tiles = t.end(c.up.tiles());
    for (int64_t tile = t.begin(c.up.tiles()); tile < tiles; tile++) {
      const int64_t later = tile + c.up.lead();
      const void* next[] = {later < tiles ? c.up.tile(later) : nullptr,
                            later < tiles ? c.gate.tile(later) : nullptr};
      half_way(t, c.gate, c.up, tile, next, x, [&](int64_t b) { return everyones[b]; });
    }
    meet(t);
    if (c.num_experts) {
      route(t, c, rows_.expert_ids + index * batch_ * c.experts_per_token);
      visit_experts(t, c, x.each);
      meet(t);
    }

    const int64_t outputs = (model_.dim + TILE - 1) / TILE;
    const int64_t begin = t.begin(outputs), end = t.end(outputs);
    const int64_t first = begin * TILE, last = std::min(end * TILE, model_.dim);
    for (int64_t b = 0; b < batch_ && first < last; b++)
      std::fill(answer_[b] + first, answer_[b] + last, 0.f);
    if (c.num_experts) {
      const int64_t A = c.experts_per_token, width = end - begin;
      const Vector* hidden =
          round(t, 0, expert_hidden_, c.w_up.rows, {&c.w_down}, batch_ * A);
      const Routes& r = t.routes;
      const int64_t units = int64_t(r.experts.size()) * width, lead = c.w_down.lead();
      Vectors theirs = {};
      for (int64_t unit = 0; unit < units; unit++) {
        const int64_t e = unit / width, tile = begin + unit % width, later = unit + lead;
        const int64_t* members = r.members.data() + r.starts[e];
        const int64_t count = r.starts[e + 1] - r.starts[e];
        const Matrix down = c.w_down.at(r.experts[e]);
        if (tile == begin) {
          for (int64_t i = 0; i < count; i++) t.gathered[i] = hidden[members[i]];
          theirs = with_parts(t, 0, t.gathered.data(), count, {&down});
        }
        const void* next = later < units
            ? c.w_down.at(r.experts[later / width]).tile(begin + later % width) : nullptr;
        tile_product(down, tile, theirs, t.tile.data(), next);
        for (int64_t i = 0; i < count; i++) {
          float* to = answer_[members[i] / A] + tile * TILE;
          for (int64_t j = 0; j < rows_in(down, tile); j++)
            to[j] += r.weights[members[i]] * t.tile[i * TILE + j];
        }
      }
    }
    if (c.down.rows) {
      const Vectors hidden = prepare(t, 1, everyones, c.down.columns, {&c.down});
      for (int64_t tile = begin; tile < end; tile++) {
        const int64_t later = tile + c.down.lead();
        tile_product(c.down, tile, hidden, t.tile.data(),
                     later < end ? c.down.tile(later) : nullptr);
        for (int64_t b = 0; b < batch_; b++)
          for (int64_t j = 0; j < rows_in(c.down, tile); j++)
            answer_[b][tile * TILE + j] += t.tile[b * TILE + j];
      }
    }
    for (int64_t b = 0; b < batch_; b++)
      for (int64_t i = first; i < last; i++) x_[b][i] += answer_[b][i];
    meet(t);
  }

  // A tile of an expert's hidden vector for each input; row i goes to to(i). `next`: of `up`
  // and `gate`, what to ask for meanwhile.
  template <class To>
  void half_way(Thread& t, const Matrix& gate, const Matrix& up, int64_t tile,
                const void* const next[2], const Vectors& x, To to) {
    float *by_up = t.tile.data(), *by_gate = t.other_tile.data();
    tile_product(up, tile, x, by_up, next[0]);
    const int64_t rows = rows_in(up, tile);
    if (gate.rows) {
      tile_product(gate, tile, x, by_gate, next[1]);
      for (int64_t i = 0; i < x.count; i++) {
        float* y = to(i) + tile * TILE;
#pragma omp simd
        for (int64_t j = 0; j < rows; j++)
          y[j] = silu(by_gate[i * TILE + j]) * by_up[i * TILE + j];
      }
    } else {
      for (int64_t i = 0; i < x.count; i++)
        for (int64_t j = 0; j < rows; j++) {
          const float u = by_up[i * TILE + j];
          to(i)[tile * TILE + j] = 0.5f * u * (1.f + std::erf(u * 0.70710678f));
        }
    }
  }

  void visit_experts(Thread& t, const Channel& c, const Vector* all) {
    const Routes& r = t.routes;
    const int64_t A = c.experts_per_token, tiles = c.w_up.tiles();
    const int64_t units = int64_t(r.experts.size()) * tiles;
    const int64_t end = t.end(units), lead = c.w_up.lead();
    const auto at = [&](const Matrix& of, int64_t unit) {
      return of.rows && unit < end ? of.at(r.experts[unit / tiles]).tile(unit % tiles) : nullptr;
    };
    for (int64_t unit = t.begin(units); unit < end;) {
      const int64_t e = unit / tiles;
      const int64_t* members = r.members.data() + r.starts[e];
      const int64_t count = r.starts[e + 1] - r.starts[e];
      for (int64_t i = 0; i < count; i++) t.gathered[i] = all[members[i] / A];
      const Matrix gate = c.w_gate.rows ? c.w_gate.at(r.experts[e]) : c.w_gate;
      const Matrix up = c.w_up.at(r.experts[e]);
      const Vectors x = with_parts(t, 1, t.gathered.data(), count, {&gate, &up});
      for (; unit < end && unit / tiles == e; unit++) {
        const void* next[] = {at(c.w_up, unit + lead), at(c.w_gate, unit + lead)};
        half_way(t, gate, up, unit % tiles, next, x,
                 [&](int64_t i) { return expert_hidden_[members[i]]; });
      }
    }
  }

  void route(Thread& t, const Channel& c, int64_t* expert_ids) {
    const int64_t A = c.experts_per_token;
    Choices& chosen = shares_ ? choices_ : t.choices;
    chosen.reserve(batch_ * A);
    t.routes.scores.resize(2 * c.num_experts);
    const auto [begin, end] = my_rows(t, batch_);
    for (int64_t b = begin; b < end; b++) {
      int64_t* ids = chosen.ids.data() + b * A;
      choose(c, router_[b], t.routes.scores.data(), ids, chosen.weights.data() + b * A);
      if (rows_.expert_ids && (shares_ || t.me == 0)) std::copy(ids, ids + A, expert_ids + b * A);
    }
    if (shares_) meet(t);
    t.routes.weights = chosen.weights.data();
    group_by_expert(t.routes, chosen.ids.data(), batch_ * A, c.num_experts);
  }
};

}  // namespace

// Bytes of the four structs, for the caller to compare with its own.
EXPORT void decoder_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Model);
  sizes[1] = sizeof(Layer);
  sizes[2] = sizeof(LayerState);
  sizes[3] = sizeof(Batch);
}

// The description is copied; weights are read where they lie, and must stay there.
EXPORT void* decoder_new(const Model* model) { return new Decoder(*model); }

EXPORT void decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Read a token of every row; logits [rows, vocab].
EXPORT void decoder_step(void* decoder, const Batch* batch, const LayerState* states,
                         float* logits, int threads) {
  static_cast<Decoder*>(decoder)->step(*batch, states, logits, threads);
}
