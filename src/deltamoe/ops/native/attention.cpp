// Causal softmax attention within sequences packed along the tokens, forward and backward; see
// ops/attention. Sums are fp32; the factors of the products too, unless the inputs are bf16 and the
// machine multiplies bf16 in AMX's tiles.
//
// A head's query and key have two parts: one of its own, and one whose keys all heads share. A task
// is one head of one sequence (forward: GROUP of its queries), whose keys and values are laid out
// in fp32 as the products read them. Scores exist for BLOCK_Q queries and BLOCK_K keys at a time;
// the largest score so far is subtracted before exp (flash attention: arXiv 2205.14135, 2307.08691).
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

// As `gemm`, with factors rounded to bf16 if there is room for them.
template <Into into>
void product(bf16* room, int64_t M, int64_t N, int64_t K, Strided a, const float* b, ptrdiff_t ldb,
             float* c, ptrdiff_t ldc, const float* scale = nullptr) {
  if (room) gemm_bf16<into>(M, N, K, a, b, ldb, c, ldc, room, scale);
  else gemm<into>(M, N, K, a, b, ldb, c, ldc, scale);
}

// What the largest product here needs, none of whose sides exceeds `largest`.
std::vector<bf16> room_for(bool rounds, int64_t width) {
  const int64_t largest = std::max(width + 32, BLOCK_K);
  return std::vector<bf16>(rounds ? packed_size(BLOCK_K, largest) * 2 : 0);
}

// Rows first .. first + count of one head, both parts side by side, into to [count, width].
template <class X>
void fetch(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, float* to,
           int64_t width) {
  for (int64_t r = 0; r < count; r++, to += width) {
    const X* from = static_cast<const X*>(a.data) + (first + r) * a.row + head * a.head;
    for (int64_t i = 0; i < a.size; i++) to[i] = to_float(from[i]);
    from = static_cast<const X*>(b.data) + (first + r) * b.row + head * b.head;
    for (int64_t i = 0; i < b.size; i++) to[a.size + i] = to_float(from[i]);
    for (int64_t i = a.size + b.size; i < width; i++) to[i] = 0.f;
  }
}

template <class X>
void give_back(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, float scale,
               const float* from, int64_t width) {
  for (int64_t r = 0; r < count; r++, from += width) {
    X* to = static_cast<X*>(a.data) + (first + r) * a.row + head * a.head;
    for (int64_t i = 0; i < a.size; i++) to[i] = from_float<X>(from[i] * scale);
    to = static_cast<X*>(b.data) + (first + r) * b.row + head * b.head;
    for (int64_t i = 0; i < b.size; i++) to[i] = from_float<X>(from[a.size + i] * scale);
  }
}

// Scores, before they are scaled, of queries q0 .. q0 + rows and keys k0 .. k0 + columns (a multiple of LANES; what lies
// beyond the diagonal is -inf). Positions count from the sequence's first token.
inline void scores_of(bf16* room, int64_t q0, int64_t rows, int64_t k0, int64_t columns, int64_t depth,
                      const float* q, int64_t q_width, const float* keys, int64_t keys_width,
                      float* scores) {
  product<Into::SET>(room, rows, columns, depth, {q, q_width, 1}, keys + k0, keys_width, scores,
                     APART);
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
  const int64_t depth = in.q.size + in.q_shared.size, width = padded(depth);
  const int64_t v_width = padded(in.v.size);
  const Part none{in.v.data, 0, 0, 0};
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(rounds);
    std::vector<bf16> packed = room_for(rounds, std::max(width, v_width));
    bf16* room = rounds ? packed.data() : nullptr;
    std::vector<float> rows, keys, values;
    std::vector<float> q(BLOCK_Q * width), scores(BLOCK_Q * APART), sums(BLOCK_Q * v_width);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = padded(task.end), keys_row = sources + LANES;
      rows.assign(sources * width, 0.f);
      keys.resize(width * keys_row);
      values.assign(sources * v_width, 0.f);
      fetch<X>(in.k, in.k_shared, task.first, task.end, task.head, rows.data(), width);
      transpose(sources, width, rows.data(), width, keys.data(), keys_row);
      fetch<X>(in.v, none, task.first, task.end, task.head, values.data(), v_width);
      for (int64_t q0 = task.begin; q0 < task.end; q0 += BLOCK_Q) {
        const int64_t count = std::min(BLOCK_Q, task.end - q0);
        const int64_t lines = rounds ? padded(count) : count;  // the last ones empty
        float largest[BLOCK_Q], total[BLOCK_Q], shrink[BLOCK_Q];
        fetch<X>(in.q, in.q_shared, task.first + q0, count, task.head, q.data(), width);
        std::fill(q.begin() + count * width, q.begin() + lines * width, 0.f);
        for (int64_t r = 0; r < lines; r++) largest[r] = -INF, total[r] = 0.f;
        std::fill(sums.begin(), sums.begin() + lines * v_width, 0.f);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, padded(q0 + count) - k0);
          scores_of(room, q0, lines, k0, columns, depth, q.data(), width, keys.data(), keys_row,
                    scores.data());
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
          }
          product<Into::SCALE_ADD>(room, lines, v_width, columns, {scores.data(), APART, 1},
                                   values.data() + k0 * v_width, v_width, sums.data(), v_width,
                                   shrink);
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
  const int64_t depth = in.q.size + in.q_shared.size, width = padded(depth);
  const int64_t v_width = padded(in.v.size);
  const Part none{in.v.data, 0, 0, 0};
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(rounds);
    std::vector<bf16> packed = room_for(rounds, std::max(width, v_width));
    bf16* room = rounds ? packed.data() : nullptr;
    std::vector<float> rows, keys, value_rows, values, to_keys, to_values;
    std::vector<float> q(BLOCK_Q * width), to_q(BLOCK_Q * width);
    std::vector<float> answer(BLOCK_Q * v_width), to_answer(BLOCK_Q * v_width);
    std::vector<float> weights(BLOCK_Q * APART), to_scores(BLOCK_Q * APART);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = padded(task.length), keys_row = sources + LANES;
      rows.assign(sources * width, 0.f);
      keys.resize(width * keys_row);
      value_rows.assign(sources * v_width, 0.f);
      values.resize(v_width * keys_row);
      to_keys.assign(sources * width, 0.f);
      to_values.assign(sources * v_width, 0.f);
      fetch<X>(in.k, in.k_shared, task.first, task.length, task.head, rows.data(), width);
      transpose(sources, width, rows.data(), width, keys.data(), keys_row);
      fetch<X>(in.v, none, task.first, task.length, task.head, value_rows.data(), v_width);
      transpose(sources, v_width, value_rows.data(), v_width, values.data(), keys_row);
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
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, padded(q0 + count) - k0);
          scores_of(room, q0, lines, k0, columns, depth, q.data(), width, keys.data(), keys_row,
                    weights.data());
          product<Into::SET>(room, lines, columns, in.v.size, {to_answer.data(), v_width, 1},
                             values.data() + k0, keys_row, to_scores.data(), APART);
          for (int64_t r = 0; r < lines; r++) {
            float *weight = &weights[r * APART], *d = &to_scores[r * APART];
            for (int64_t j = 0; j < columns; j += LANES) {
              vec share = exp_lanes(load(weight + j) * scale - splat(shift[r]));
              store(weight + j, share);
              store(d + j, share * (load(d + j) - splat(mean[r])));
            }
          }
          product<Into::ADD>(room, columns, v_width, lines, {weights.data(), 1, APART},
                             to_answer.data(), v_width, to_values.data() + k0 * v_width, v_width);
          product<Into::ADD>(room, columns, width, lines, {to_scores.data(), 1, APART}, q.data(),
                             width, to_keys.data() + k0 * width, width);
          product<Into::ADD>(room, lines, width, columns, {to_scores.data(), APART, 1},
                             rows.data() + k0 * width, width, to_q.data(), width);
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
