// Causal softmax attention within sequences packed along the tokens, forward and backward; see
// ops/attention. Sums are fp32; the factors of the products too, unless the inputs are bf16 and the
// machine multiplies bf16 in AMX's tiles.
//
// A head's query and key have two parts: one of its own, and one whose keys all heads share. A task
// is one head of one sequence (forward: GROUP of its queries), whose keys and values are laid out
// once as the products read them, packed if those round. Scores exist for BLOCK_Q queries and
// BLOCK_K keys at a time; the largest score so far is subtracted before exp (flash attention: arXiv
// 2205.14135, 2307.08691).
// The backward pass keeps the inputs, the outputs and one number a query and head: the log of its
// sum of exponentials.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "gemm_bf16.h"
#include "vector.h"

namespace {

constexpr int64_t BLOCK_Q = 64, BLOCK_K = 256, GROUP = 512;
// Rows a power of two apart would meet in the same few lines of the cache.
constexpr int64_t APART = BLOCK_K + LANES;
constexpr float INF = std::numeric_limits<float>::infinity();

// A tensor [tokens, heads, channels] with touching channels.
struct Part {
  void* data;
  int64_t row, head, size;
};

// Filled in by _Inputs of ops/attention/native.py.
struct Inputs {
  Part q, q_shared, k, k_shared, v;  // k_shared.head is 0
  int64_t heads, num_borders;
  const int64_t* borders;
  float scale;
  int64_t threads;
};

int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// What stands left and right of a product: fp32 as it lies, or packed if it is to be rounded.
struct Left {
  Strided wide;
  const bf16* packed;
};
struct Right {
  const float* wide;
  ptrdiff_t row;
  const bf16* packed;
  int64_t columns;
  Right at(int64_t term, int64_t column) const {  // the term a multiple of 32, or 0
    return {wide + term * row + column, row, packed + term * columns + column * 32, columns};
  }
};

// One thread's room for an operand, as large as any it ever held.
class Room {
 public:
  bf16* of(int64_t lines, int64_t terms) {
    const size_t size = packed_size(size_t(lines), size_t(terms));
    if (kept_.size() < size) kept_.resize(size);
    return kept_.data();
  }

 private:
  std::vector<bf16> kept_;
};

// Products in fp32, or with factors rounded to bf16 in the tiles.
struct Products {
  bool rounds;

  Left left(int64_t M, int64_t K, Strided a, Room& room) const {
    if (!rounds) return {a, nullptr};
    bf16* packed = room.of(M, K);
    pack_left(int(M), int(K), a, packed);
    return {a, packed};
  }

  Right right(int64_t K, int64_t N, const float* b, Room& room) const {
    if (!rounds) return {b, N, nullptr, N};
    bf16* packed = room.of(N, K);
    pack_right(int(N), int(K), b, N, packed);
    return {b, N, packed, N};
  }

  // The right operand [K, N] that is `rows` [N, K] transposed.
  Right turned(int64_t K, int64_t N, const float* rows, std::vector<float>& wide, Room& room,
               Room& between) const {
    if (!rounds) {
      const int64_t row = N + LANES;  // rows a power of two apart would share lines of the cache
      wide.resize(K * row);
      transpose(int(N), int(K), rows, K, wide.data(), row);
      return {wide.data(), row, nullptr, N};
    }
    bf16 *packed = room.of(N, K), *lines = between.of(N, K);
    pack_left(int(N), int(K), {rows, K, 1}, lines);
    pack_turned(int(N), int(K), lines, packed);
    return {nullptr, 0, packed, N};
  }

  template <Into into>
  void run(int64_t M, int64_t N, int64_t K, Left a, Right b, float* c, ptrdiff_t ldc) const {
    static_assert(into == Into::SET || into == Into::ADD, "tiles only add");
    if (!rounds) return gemm<into>(int(M), int(N), int(K), a.wide, b.wide, b.row, c, ldc);
    const int width = (int(K) + 31) / 32 * 32;
    gemm_packed<into == Into::ADD>(int(M), int(N), width, a.packed, width, b.packed,
                                   int(b.columns), c, ldc);
  }
};

template <class X>
void widen(const X* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(to + i, load_wide(from + i));
  for (; i < size; i++) to[i] = to_float(from[i]);
}

template <class X>
void narrow(const float* from, int64_t size, float scale, X* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store_narrow(to + i, load(from + i) * splat(scale));
  for (; i < size; i++) to[i] = from_float<X>(from[i] * scale);
}

// Rows first .. first + count of one head, both parts side by side, into to [count, width].
template <class X>
void fetch(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, float* to,
           int64_t width) {
  for (int64_t r = 0; r < count; r++, to += width) {
    const X* from = static_cast<const X*>(a.data) + (first + r) * a.row + head * a.head;
    widen(from, a.size, to);
    from = static_cast<const X*>(b.data) + (first + r) * b.row + head * b.head;
    widen(from, b.size, to + a.size);
    for (int64_t i = a.size + b.size; i < width; i++) to[i] = 0.f;
  }
}

template <class X>
void give_back(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, float scale,
               const float* from, int64_t width) {
  for (int64_t r = 0; r < count; r++, from += width) {
    X* to = static_cast<X*>(a.data) + (first + r) * a.row + head * a.head;
    narrow(from, a.size, scale, to);
    to = static_cast<X*>(b.data) + (first + r) * b.row + head * b.head;
    narrow(from + a.size, b.size, scale, to);
  }
}

// Scores, before they are scaled, of queries q0 .. q0 + rows and keys k0 .. k0 + columns (a
// multiple of LANES; what lies beyond the diagonal is -inf). Positions count from the sequence's
// first token.
inline void scores_of(const Products& products, int64_t q0, int64_t rows, int64_t k0,
                      int64_t columns, int64_t width, Left q, Right keys, float* scores) {
  products.run<Into::SET>(rows, columns, width, q, keys.at(0, k0), scores, APART);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = q0 + r + 1 > k0 ? q0 + r + 1 - k0 : 0; j < columns; j++)
      scores[r * APART + j] = -INF;
}

struct Task {
  int64_t first, length, head, begin, end;  // of the sequence in the rows; the queries to answer
};

std::vector<Task> tasks_of(const Inputs& in, int64_t group) {
  std::vector<Task> tasks;
  for (int64_t n = 0; n + 1 < in.num_borders; n++) {
    int64_t first = in.borders[n], length = in.borders[n + 1] - first;
    int64_t step = group ? group : length;
    for (int64_t begin = 0; begin < length; begin += step)
      for (int64_t head = 0; head < in.heads; head++)
        tasks.push_back({first, length, head, begin, std::min(begin + step, length)});
  }
  return tasks;
}

template <class X>
void forward(const Inputs& in, const Part& out, float* log_sums, bool rounds) {
  const std::vector<Task> tasks = tasks_of(in, GROUP);
  const int64_t width = padded(in.q.size + in.q_shared.size);
  const int64_t v_width = padded(in.v.size);
  const Part none{in.v.data, 0, 0, 0};
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(rounds);
    const Products products{rounds};
    Room keys_room, values_room, q_room, room;
    std::vector<float> rows, turned, values;
    std::vector<float> q(BLOCK_Q * width), scores(BLOCK_Q * APART), sums(BLOCK_Q * v_width);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = padded(task.end);
      rows.assign(sources * width, 0.f);
      values.assign(sources * v_width, 0.f);
      fetch<X>(in.k, in.k_shared, task.first, task.end, task.head, rows.data(), width);
      fetch<X>(in.v, none, task.first, task.end, task.head, values.data(), v_width);
      const Right keys = products.turned(width, sources, rows.data(), turned, keys_room, room);
      const Right answers = products.right(sources, v_width, values.data(), values_room);
      for (int64_t q0 = task.begin; q0 < task.end; q0 += BLOCK_Q) {
        const int64_t count = std::min(BLOCK_Q, task.end - q0);
        const int64_t lines = rounds ? padded(count) : count;  // the last ones empty
        float largest[BLOCK_Q], total[BLOCK_Q], shrink[BLOCK_Q];
        fetch<X>(in.q, in.q_shared, task.first + q0, count, task.head, q.data(), width);
        std::fill(q.begin() + count * width, q.begin() + lines * width, 0.f);
        const Left asks = products.left(lines, width, {q.data(), width, 1}, q_room);
        for (int64_t r = 0; r < lines; r++) largest[r] = -INF, total[r] = 0.f;
        std::fill(sums.begin(), sums.begin() + lines * v_width, 0.f);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, padded(q0 + count) - k0);
          scores_of(products, q0, lines, k0, columns, width, asks, keys, scores.data());
          for (int64_t r = 0; r < lines; r++) {
            float* row = scores.data() + r * APART;
            float before = largest[r], top = before;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < columns; j++) top = row[j] > top ? row[j] : top;
            vec sums_of_row{};
            for (int64_t j = 0; j < columns; j += LANES) {
              vec weight = exp_lanes((load(row + j) - splat(top)) * scale);
              store(row + j, weight);
              sums_of_row += weight;
            }
            shrink[r] = exp_fast((before - top) * in.scale);
            total[r] = total[r] * shrink[r] + sum(sums_of_row);
            largest[r] = top;
            if (k0)
              for (int64_t i = 0; i < v_width; i += LANES)
                store(&sums[r * v_width + i], load(&sums[r * v_width + i]) * splat(shrink[r]));
          }
          const Left shares = products.left(lines, columns, {scores.data(), APART, 1}, room);
          products.run<Into::ADD>(lines, v_width, columns, shares, answers.at(k0, 0), sums.data(),
                                  v_width);
        }
        for (int64_t r = 0; r < count; r++) {
          log_sums[(task.first + q0 + r) * in.heads + task.head] =
              largest[r] * in.scale + std::log(total[r]);
          for (int64_t i = 0; i < v_width; i++) sums[r * v_width + i] /= total[r];
        }
        give_back<X>(out, none, task.first + q0, count, task.head, 1.f, sums.data(), v_width);
      }
    }
  }
}

// The shared keys' gradient is written head by head; d_k_shared.head says where.
template <class X>
void backward(const Inputs& in, const Part& out, const float* log_sums, const Part& d_out,
              const Part& d_q, const Part& d_q_shared, const Part& d_k, const Part& d_k_shared,
              const Part& d_v, bool rounds) {
  const std::vector<Task> tasks = tasks_of(in, 0);
  const int64_t width = padded(in.q.size + in.q_shared.size);
  const int64_t v_width = padded(in.v.size);
  const Part none{in.v.data, 0, 0, 0};
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(rounds);
    const Products products{rounds};
    Room keys_room, values_room, rows_room, room;
    Room q_left_room, q_right_room, answer_left_room, answer_right_room;
    std::vector<float> rows, turned_rows, values, turned_values, to_keys, to_values;
    std::vector<float> q(BLOCK_Q * width), to_q(BLOCK_Q * width);
    std::vector<float> answer(BLOCK_Q * v_width), to_answer(BLOCK_Q * v_width);
    std::vector<float> weights(BLOCK_Q * APART), to_scores(BLOCK_Q * APART);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = padded(task.length);
      rows.assign(sources * width, 0.f);
      values.assign(sources * v_width, 0.f);
      to_keys.assign(sources * width, 0.f);
      to_values.assign(sources * v_width, 0.f);
      fetch<X>(in.k, in.k_shared, task.first, task.length, task.head, rows.data(), width);
      fetch<X>(in.v, none, task.first, task.length, task.head, values.data(), v_width);
      const Right by_key = products.right(sources, width, rows.data(), rows_room);
      const Right keys = products.turned(width, sources, rows.data(), turned_rows, keys_room, room);
      const Right answers =
          products.turned(v_width, sources, values.data(), turned_values, values_room, room);
      for (int64_t q0 = 0; q0 < task.length; q0 += BLOCK_Q) {
        const int64_t count = std::min(BLOCK_Q, task.length - q0), here = task.first + q0;
        const int64_t lines = rounds ? padded(count) : count;  // the last ones empty
        float shift[BLOCK_Q] = {}, mean[BLOCK_Q] = {};
        fetch<X>(in.q, in.q_shared, here, count, task.head, q.data(), width);
        fetch<X>(out, none, here, count, task.head, answer.data(), v_width);
        fetch<X>(d_out, none, here, count, task.head, to_answer.data(), v_width);
        std::fill(q.begin() + count * width, q.begin() + lines * width, 0.f);
        std::fill(to_answer.begin() + count * v_width, to_answer.begin() + lines * v_width, 0.f);
        for (int64_t r = 0; r < count; r++) {
          shift[r] = log_sums[(here + r) * in.heads + task.head];
          vec along{};
          for (int64_t i = 0; i < v_width; i += LANES)
            along += load(&answer[r * v_width + i]) * load(&to_answer[r * v_width + i]);
          mean[r] = sum(along);
        }
        std::fill(to_q.begin(), to_q.begin() + lines * width, 0.f);
        const Left asks = products.left(lines, width, {q.data(), width, 1}, q_left_room);
        const Right asked = products.right(lines, width, q.data(), q_right_room);
        const Left wanted =
            products.left(lines, v_width, {to_answer.data(), v_width, 1}, answer_left_room);
        const Right wants = products.right(lines, v_width, to_answer.data(), answer_right_room);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, padded(q0 + count) - k0);
          scores_of(products, q0, lines, k0, columns, width, asks, keys, weights.data());
          products.run<Into::SET>(lines, columns, v_width, wanted, answers.at(0, k0),
                                  to_scores.data(), APART);
          for (int64_t r = 0; r < lines; r++) {
            float *weight = &weights[r * APART], *d = &to_scores[r * APART];
            for (int64_t j = 0; j < columns; j += LANES) {
              vec share = exp_lanes(load(weight + j) * scale - splat(shift[r]));
              store(weight + j, share);
              store(d + j, share * (load(d + j) - splat(mean[r])));
            }
          }
          const Left shares = products.left(columns, lines, {weights.data(), 1, APART}, room);
          products.run<Into::ADD>(columns, v_width, lines, shares, wants,
                                  to_values.data() + k0 * v_width, v_width);
          const Left slopes = products.left(columns, lines, {to_scores.data(), 1, APART}, room);
          products.run<Into::ADD>(columns, width, lines, slopes, asked, to_keys.data() + k0 * width,
                                  width);
          const Left along = products.left(lines, columns, {to_scores.data(), APART, 1}, room);
          products.run<Into::ADD>(lines, width, columns, along, by_key.at(k0, 0), to_q.data(),
                                  width);
        }
        give_back<X>(d_q, d_q_shared, here, count, task.head, in.scale, to_q.data(), width);
      }
      give_back<X>(d_k, d_k_shared, task.first, task.length, task.head, in.scale, to_keys.data(),
                   width);
      give_back<X>(d_v, none, task.first, task.length, task.head, 1.f, to_values.data(), v_width);
    }
  }
}

}  // namespace

// All parts are fp32 or bf16; log_sums is [tokens, heads].
EXPORT void attention_forward(const Inputs* in, int is_bf16, const Part* out, float* log_sums) {
  (is_bf16 ? forward<bf16> : forward<float>)(*in, *out, log_sums, is_bf16 && amx_granted());
}

// gradients: of q, q_shared, k, k_shared (by heads) and v.
EXPORT void attention_backward(const Inputs* in, int is_bf16, const Part* out,
                               const float* log_sums, const Part* d_out, const Part* gradients) {
  auto run = is_bf16 ? backward<bf16> : backward<float>;
  run(*in, *out, log_sums, *d_out, gradients[0], gradients[1], gradients[2], gradients[3],
      gradients[4], is_bf16 && amx_granted());
}
