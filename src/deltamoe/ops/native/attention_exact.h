// Causal attention in fp32.
//
// A task is one head of one sequence (forward: GROUP of its queries), whose keys and values are
// laid out once as the products read them. Scores exist for BLOCK_Q queries and BLOCK_K keys at a
// time; the largest score so far is subtracted before exp.
#pragma once

#include <cmath>

#include "attention_problem.h"
#include "buffer.h"
#include "gemm.h"

namespace {

constexpr int64_t BLOCK_Q = 64, BLOCK_K = 256, GROUP = 512;
// Rows a power of two apart would meet in the same few lines of the cache.
constexpr int64_t APART = BLOCK_K + LANES;

// c [M, N] = (or +=) a b
template <Into into>
void multiply(int64_t M, int64_t N, int64_t K, Strided a, const float* b, ptrdiff_t b_row, float* c,
              ptrdiff_t c_row) {
  gemm<into>(int(M), int(N), int(K), a, b, b_row, c, c_row);
}

// A right operand [K, N] that is `rows` [N, K] transposed.
struct Turned {
  void take(int64_t K, int64_t N, const float* rows) {
    row = N + LANES;  // rows a power of two apart would share lines of the cache
    wide.resize(K * row);
    transpose(int(N), int(K), rows, K, wide.data(), row);
  }
  std::vector<float> wide;
  ptrdiff_t row = 0;
};

// The first `count` rows of one head, and zeros up to a multiple of LANES rows.
template <class X>
void fetch_all(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head,
               std::vector<float>& to, int64_t width) {
  to.assign(up_to(count, LANES) * width, 0.f);
  fetch<X>(a, b, first, count, head, to.data(), width);
}

// Scores, before they are scaled, of queries q0 .. q0 + rows and keys k0 .. k0 + columns (a
// multiple of LANES; what lies beyond the diagonal is -inf). Positions count from the sequence's
// first token.
void scores_of(int64_t q0, int64_t rows, int64_t k0, int64_t columns, int64_t width,
               const float* q, const Turned& keys, float* scores) {
  multiply<Into::SET>(rows, columns, width, {q, width, 1}, keys.wide.data() + k0, keys.row, scores,
                      APART);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = q0 + r + 1 > k0 ? q0 + r + 1 - k0 : 0; j < columns; j++)
      scores[r * APART + j] = -INF;
}

template <class X>
void forward_exactly(const Inputs& in, const Part& out, float* log_sums) {
  const std::vector<Task> tasks = tasks_of(in, GROUP);
  const int64_t width = up_to(in.q.size + in.q_shared.size, LANES);
  const int64_t v_width = up_to(in.v.size, LANES);
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    Turned keys;
    std::vector<float> rows, values;
    std::vector<float> q(BLOCK_Q * width), scores(BLOCK_Q * APART), sums(BLOCK_Q * v_width);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = up_to(task.end, LANES);
      fetch_all<X>(in.k, in.k_shared, task.first, task.end, task.head, rows, width);
      fetch_all<X>(in.v, in.none(), task.first, task.end, task.head, values, v_width);
      keys.take(width, sources, rows.data());
      for (int64_t q0 = task.begin; q0 < task.end; q0 += BLOCK_Q) {
        const int64_t count = std::min(BLOCK_Q, task.end - q0);
        float largest[BLOCK_Q], total[BLOCK_Q], shrink[BLOCK_Q];
        fetch<X>(in.q, in.q_shared, task.first + q0, count, task.head, q.data(), width);
        for (int64_t r = 0; r < count; r++) largest[r] = -INF, total[r] = 0.f;
        std::fill(sums.begin(), sums.begin() + count * v_width, 0.f);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, up_to(q0 + count, LANES) - k0);
          scores_of(q0, count, k0, columns, width, q.data(), keys, scores.data());
          for (int64_t r = 0; r < count; r++) {
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
          multiply<Into::ADD>(count, v_width, columns, {scores.data(), APART, 1},
                              &values[k0 * v_width], v_width, sums.data(), v_width);
        }
        for (int64_t r = 0; r < count; r++) {
          log_sums[(task.first + q0 + r) * in.heads + task.head] =
              largest[r] * in.scale + std::log(total[r]);
          for (int64_t i = 0; i < v_width; i++) sums[r * v_width + i] /= total[r];
        }
        give_back<X>(out, in.none(), task.first + q0, count, task.head, 1.f, sums.data(), v_width);
      }
    }
  }
}

// The shared keys' gradient is written head by head; d_k_shared.head says where.
template <class X>
void backward_exactly(const Inputs& in, const Part& out, const float* log_sums, const Part& d_out,
                      const Part& d_q, const Part& d_q_shared, const Part& d_k,
                      const Part& d_k_shared, const Part& d_v) {
  const std::vector<Task> tasks = tasks_of(in, 0);
  const int64_t width = up_to(in.q.size + in.q_shared.size, LANES);
  const int64_t v_width = up_to(in.v.size, LANES);
  const vec scale = splat(in.scale);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    Turned keys, answers;
    std::vector<float> rows, values, to_keys, to_values;
    std::vector<float> q(BLOCK_Q * width), to_q(BLOCK_Q * width);
    std::vector<float> answer(BLOCK_Q * v_width), to_answer(BLOCK_Q * v_width);
    std::vector<float> weights(BLOCK_Q * APART), to_scores(BLOCK_Q * APART);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = up_to(task.length, LANES);
      to_keys.assign(sources * width, 0.f);
      to_values.assign(sources * v_width, 0.f);
      fetch_all<X>(in.k, in.k_shared, task.first, task.length, task.head, rows, width);
      fetch_all<X>(in.v, in.none(), task.first, task.length, task.head, values, v_width);
      keys.take(width, sources, rows.data());
      answers.take(v_width, sources, values.data());
      for (int64_t q0 = 0; q0 < task.length; q0 += BLOCK_Q) {
        const int64_t count = std::min(BLOCK_Q, task.length - q0), here = task.first + q0;
        float shift[BLOCK_Q], mean[BLOCK_Q];
        fetch<X>(in.q, in.q_shared, here, count, task.head, q.data(), width);
        fetch<X>(out, in.none(), here, count, task.head, answer.data(), v_width);
        fetch<X>(d_out, in.none(), here, count, task.head, to_answer.data(), v_width);
        for (int64_t r = 0; r < count; r++) {
          shift[r] = log_sums[(here + r) * in.heads + task.head];
          vec along{};
          for (int64_t i = 0; i < v_width; i += LANES)
            along += load(&answer[r * v_width + i]) * load(&to_answer[r * v_width + i]);
          mean[r] = sum(along);
        }
        std::fill(to_q.begin(), to_q.begin() + count * width, 0.f);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += BLOCK_K) {
          const int64_t columns = std::min(BLOCK_K, up_to(q0 + count, LANES) - k0);
          scores_of(q0, count, k0, columns, width, q.data(), keys, weights.data());
          multiply<Into::SET>(count, columns, v_width, {to_answer.data(), v_width, 1},
                              answers.wide.data() + k0, answers.row, to_scores.data(), APART);
          for (int64_t r = 0; r < count; r++) {
            float *weight = &weights[r * APART], *d = &to_scores[r * APART];
            for (int64_t j = 0; j < columns; j += LANES) {
              vec share = exp_lanes(load(weight + j) * scale - splat(shift[r]));
              store(weight + j, share);
              store(d + j, share * (load(d + j) - splat(mean[r])));
            }
          }
          multiply<Into::ADD>(columns, v_width, count, {weights.data(), 1, APART},
                              to_answer.data(), v_width, &to_values[k0 * v_width], v_width);
          multiply<Into::ADD>(columns, width, count, {to_scores.data(), 1, APART}, q.data(), width,
                              &to_keys[k0 * width], width);
          multiply<Into::ADD>(count, width, columns, {to_scores.data(), APART, 1},
                              &rows[k0 * width], width, to_q.data(), width);
        }
        give_back<X>(d_q, d_q_shared, here, count, task.head, in.scale, to_q.data(), width);
      }
      give_back<X>(d_k, d_k_shared, task.first, task.length, task.head, in.scale, to_keys.data(),
                   width);
      give_back<X>(d_v, in.none(), task.first, task.length, task.head, 1.f, to_values.data(),
                   v_width);
    }
  }
}

}  // namespace
