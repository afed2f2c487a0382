// Causal attention to bf16 tensors on AMX's tiles: operands rounded, sums in fp32.
//
// Scores stand on their side: a row a key, a column a query, 32 queries at a time. So a query's
// largest score, its sum and what is subtracted are lanes of vectors, and what exp makes of the
// scores is the next product's operand without being turned: right of V^T (forward) and of K^T
// (d_q), left of the queries' gradients (d_v) and of the queries (d_k).
#pragma once

#include <cmath>

#include "attention_problem.h"
#include "slices.h"

#if HAS_TILES

namespace {

constexpr int64_t QUERIES = 32;     // a block's: two vectors
constexpr int64_t KEYS = 128;       // whose scores for a block of queries stay in the first cache
constexpr int64_t AT_ONCE = 1024;   // queries of a task
constexpr int64_t TOGETHER = KEYS;  // queries between two changes of the keys' gradients

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// 2^x to 2e-7 of itself for x <= 0; 0 below -126, NaN stays NaN.
inline vec exp2_of(vec x) {
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, 8), r = x - n;
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (vec)_mm512_maskz_scalef_ps(counts, (__m512)exp2_of_fraction(r), (__m512)n);
}
inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }

// Rows first .. first + count of one head, both parts side by side and zeros, into
// to [up_to(count, 32), width]. A store may go over the row's end, so rows come in order.
void gather(const Part& a, const Part& b, int64_t first, int64_t count, int64_t head, bf16* to,
            int64_t width) {
  const auto copy = [](const Part& part, int64_t token, int64_t head, bf16* to) {
    const bf16* from = part.at<bf16>(token, head);
    for (int64_t c = 0; c < part.size; c += 32)
      _mm512_storeu_si512(to + c, line(from + c, part.size - c));
  };
  for (int64_t r = 0; r < count; r++) {
    _mm512_storeu_si512(to + (r + 1) * width - 32, _mm512_setzero_si512());
    copy(a, first + r, head, to + r * width);
    copy(b, first + r, head, to + r * width + a.size);
  }
  std::fill(to + count * width, to + up_to(count, 32) * width, bf16{});
}

// Rows [32, width] as the columns of a slice.
void pack_queries(const bf16* rows, int64_t width, bf16* slice) {
  pack_lines(rows, width, UNIT, width, slice);
  pack_lines(rows + UNIT * width, width, UNIT, width, slice + 512);
}

// Scores of keys k .. k + 32, of which the queries from q on do not see those behind them.
void hide_later(int64_t k, int64_t q, float* scores) {
  for (int64_t r = k > q ? 0 : q - k + 1; r < 32; r++)
    for (int64_t j = 0; j < QUERIES && q + j < k + r; j++) scores[r * QUERIES + j] = -INF;
}

// columns [size, queries] of `from` to rows [queries, size].
void turn_back(int64_t size, int64_t queries, const float* from, float* to) {
  transpose(int(size), int(queries), from, queries, to, size);
}

float dot(const bf16* a, const bf16* b, int64_t size) {
  vec sums{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) sums += load_wide(a + i) * load_wide(b + i);
  float total = sum(sums);
  for (; i < size; i++) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

// ── forward ──────────────────────────────────────────────────────────────────────────────────────

// What a block's queries have seen so far: the largest score and the sum of powers of two.
struct Seen {
  struct Shrink {  // what sums of all that was weighed before are to be multiplied by
    vec by[2];
  };

  // Scores [keys, QUERIES] become weights, a slice of terms.
  Shrink take(const float* scores, int64_t keys, vec scale, bf16* weights) {
    // A NaN may be passed over here: it is found again below.
    vec largest[4];  // of even and odd keys, lest each waits for the one before
    for (int64_t i = 0; i < 4; i++) largest[i] = load(scores + i * LANES);
    for (int64_t r = 2; r < keys; r += 2)
      for (int64_t i = 0; i < 4; i++)
        largest[i] = larger(load(scores + r * QUERIES + i * LANES), largest[i]);
    Shrink shrink;
    for (int64_t i = 0; i < 2; i++) {
      const vec before = top[i];
      top[i] = larger(larger(largest[i], largest[i + 2]) * scale, before);
      shrink.by[i] = exp2_of(before - top[i]);
      total[i] *= shrink.by[i];
    }
    for (int64_t r = 0; r < keys; r += 2) {
      __m512i lines[2];
      for (int64_t side = 0; side < 2; side++) {
        const float* row = scores + (r + side) * QUERIES;
        const vec low = exp2_of(load(row) * scale - top[0]);
        const vec high = exp2_of(load(row + LANES) * scale - top[1]);
        total[0] += low, total[1] += high;
        lines[side] = bf16_both(low, high);
      }
      pair_up(lines[0], lines[1], weights + r / 32 * 1024 + r % 32 * 16);
    }
    return shrink;
  }

  vec top[2] = {splat(-INF), splat(-INF)}, total[2] = {};
};

// sums [size, QUERIES]
inline void scale_columns(int64_t size, const vec* by, float* sums) {
  for (int64_t c = 0; c < size; c++)
    for (int64_t i = 0; i < 2; i++) {
      float* sum = sums + c * QUERIES + i * LANES;
      store(sum, load(sum) * by[i]);
    }
}

void forward_rounded(const Inputs& in, const Part& out, float* log_sums) {
  const std::vector<Task> tasks = tasks_of(in, AT_ONCE);
  const int64_t width = up_to(in.q.size + in.q_shared.size, 32), v_width = up_to(in.v.size, 32);
  int64_t longest = 0;
  for (const Task& task : tasks) longest = std::max(longest, task.length);
  const vec scale = splat(in.scale * LOG2_E);  // of scores: powers of two are what is summed
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(true);
    Buffer<bf16> keys(up_to(longest, 32) * width), values(v_width * odd_row(longest));
    Buffer<bf16> q(QUERIES * width), asks(QUERIES * width), weights(KEYS * QUERIES);
    Buffer<float> scores(KEYS * QUERIES), sums(v_width * QUERIES), answer(v_width * QUERIES);
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = odd_row(task.end);
      gather(in.k, in.k_shared, task.first, task.end, task.head, keys, width);
      turn_rows(task.end, in.v.size, in.v.at<bf16>(task.first, task.head), in.v.row, values,
                sources);
      for (int64_t c = up_to(in.v.size, UNIT); c < v_width; c++)
        std::fill(values + c * sources, values + (c + 1) * sources, bf16{});
      for (int64_t q0 = task.begin; q0 < task.end; q0 += QUERIES) {
        const int64_t count = std::min(QUERIES, task.end - q0);
        gather(in.q, in.q_shared, task.first + q0, count, task.head, q, width);
        pack_queries(q, width, asks);
        Seen seen;
        for (int64_t k0 = 0; k0 < q0 + count; k0 += KEYS) {
          const int64_t here = std::min(KEYS, up_to(q0 + count - k0, 32));
          gemm_packed<false>(int(here), QUERIES, int(width), keys + k0 * width, int(width), asks,
                             QUERIES, scores, QUERIES);
          for (int64_t r = 0; r < here; r += 32)
            if (k0 + r + 31 > q0) hide_later(k0 + r, q0, scores + r * QUERIES);
          const Seen::Shrink shrink = seen.take(scores, here, scale, weights);
          if (k0) scale_columns(v_width, shrink.by, sums);
          auto run = k0 ? gemm_packed<true> : gemm_packed<false>;
          run(int(v_width), QUERIES, int(here), values + k0, int(sources), weights, QUERIES, sums,
              QUERIES);
        }
        float largest[QUERIES], totals[QUERIES];
        vec parts[2];
        for (int64_t i = 0; i < 2; i++) {
          store(largest + i * LANES, seen.top[i]);
          store(totals + i * LANES, seen.total[i]);
          parts[i] = splat(1.f) / seen.total[i];
        }
        scale_columns(v_width, parts, sums);
        for (int64_t r = 0; r < count; r++)
          log_sums[(task.first + q0 + r) * in.heads + task.head] =
              largest[r] * LN_2 + std::log(totals[r]);
        turn_back(v_width, QUERIES, sums, answer);
        give_back<bf16>(out, in.none(), task.first + q0, count, task.head, 1.f, answer, v_width);
      }
    }
  }
}

// ── backward ─────────────────────────────────────────────────────────────────────────────────────

// Of 32 keys and a block of queries: scores and d, the weights' gradients, both [32, QUERIES],
// become weights and the scores' gradients, both rows of TOGETHER; the latter as terms, too.
inline void weigh(const float* scores, const float* d, vec scale, const float* shift,
                  const float* mean, bf16* weights, bf16* to_scores, bf16* terms) {
  const vec shifts[2] = {load(shift), load(shift + LANES)};
  const vec means[2] = {load(mean), load(mean + LANES)};
  for (int64_t r = 0; r < 32; r += 2) {
    __m512i lines[2];
    for (int64_t side = 0; side < 2; side++) {
      const int64_t at = (r + side) * QUERIES;
      const vec low = exp2_of(load(scores + at) * scale - shifts[0]);
      const vec high = exp2_of(load(scores + at + LANES) * scale - shifts[1]);
      lines[side] = bf16_both(low * (load(d + at) - means[0]),
                              high * (load(d + at + LANES) - means[1]));
      _mm512_storeu_si512(weights + (r + side) * TOGETHER, bf16_both(low, high));
      _mm512_storeu_si512(to_scores + (r + side) * TOGETHER, lines[side]);
    }
    pair_up(lines[0], lines[1], terms + r * 16);
  }
}

// The shared keys' gradient is written head by head; d_k_shared.head says where.
void backward_rounded(const Inputs& in, const Part& out, const float* log_sums, const Part& d_out,
                      const Part& d_q, const Part& d_q_shared, const Part& d_k,
                      const Part& d_k_shared, const Part& d_v) {
  const std::vector<Task> tasks = tasks_of(in, 0);
  const int64_t width = up_to(in.q.size + in.q_shared.size, 32), v_width = up_to(in.v.size, 32);
  int64_t longest = 0;
  for (const Task& task : tasks) longest = std::max(longest, up_to(task.length, 32));
  const vec scale = splat(in.scale * LOG2_E);  // of scores: powers of two are what is summed
#pragma omp parallel num_threads(in.threads) if (in.threads > 1)
  {
    const Tiles tiles(true);
    Buffer<bf16> keys(longest * width), turned_keys(width * odd_row(longest));
    Buffer<bf16> values(longest * v_width);
    Buffer<float> to_keys(longest * width), to_values(longest * v_width);
    // Of the queries: rows, columns (slices of 32) and terms.
    Buffer<bf16> q(TOGETHER * width), asks(TOGETHER * width), asked(TOGETHER * width);
    Buffer<bf16> wanted(TOGETHER * v_width), wants(TOGETHER * v_width), given(TOGETHER * v_width);
    Buffer<float> to_q(TOGETHER * width), rows(TOGETHER * width);
    // Of 32 keys as rows, and of KEYS of them as terms.
    Buffer<bf16> weights(32 * TOGETHER), to_scores(32 * TOGETHER), terms(KEYS * TOGETHER);
    alignas(64) float scores[32 * QUERIES], d[32 * QUERIES];
    alignas(64) float shift[TOGETHER], mean[TOGETHER];
#pragma omp for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); n++) {
      const Task& task = tasks[n];
      const int64_t sources = up_to(task.length, 32), row = odd_row(sources);
      gather(in.k, in.k_shared, task.first, task.length, task.head, keys, width);
      gather(in.v, in.none(), task.first, task.length, task.head, values, v_width);
      turn_rows(sources, width, keys, width, turned_keys, row);
      std::fill(&to_keys[0], &to_keys[sources * width], 0.f);
      std::fill(&to_values[0], &to_values[sources * v_width], 0.f);
      for (int64_t q0 = 0; q0 < task.length; q0 += TOGETHER) {
        const int64_t count = std::min(TOGETHER, task.length - q0), here = task.first + q0;
        const int64_t blocks = (count + QUERIES - 1) / QUERIES, depth = blocks * QUERIES;
        gather(in.q, in.q_shared, here, count, task.head, q, width);
        gather(d_out, in.none(), here, count, task.head, wanted, v_width);
        for (int64_t r = 0; r < depth; r++) {
          const bool is_one = r < count;
          shift[r] = is_one ? log_sums[(here + r) * in.heads + task.head] * LOG2_E : INF;
          mean[r] = is_one ? dot(out.at<bf16>(here + r, task.head), wanted + r * v_width, in.v.size)
                           : 0.f;
        }
        for (int64_t h = 0; h < blocks; h++) {
          pack_queries(q + h * QUERIES * width, width, asks + h * QUERIES * width);
          pack_queries(wanted + h * QUERIES * v_width, v_width, wants + h * QUERIES * v_width);
        }
        pair_rows(depth, width, width, [&](int64_t r) { return q + r * width; }, asked);
        pair_rows(depth, v_width, v_width, [&](int64_t r) { return wanted + r * v_width; }, given);
        for (int64_t k0 = 0; k0 < q0 + count; k0 += KEYS) {
          const int64_t some = std::min(KEYS, up_to(q0 + count - k0, 32));
          for (int64_t k = k0; k < k0 + some; k += 32) {
            const int64_t first_block = k > q0 ? (k - q0) / QUERIES : 0;  // to see these keys
            for (int64_t h = first_block; h < blocks; h++) {
              const int64_t at = h * QUERIES;
              gemm_packed<false>(32, QUERIES, int(width), keys + k * width, int(width),
                                 asks + at * width, QUERIES, scores, QUERIES);
              gemm_packed<false>(32, QUERIES, int(v_width), values + k * v_width, int(v_width),
                                 wants + at * v_width, QUERIES, d, QUERIES);
              if (k + 31 > q0 + at) hide_later(k, q0 + at, scores);
              weigh(scores, d, scale, shift + at, mean + at, weights + at, to_scores + at,
                    terms + at * KEYS + (k - k0) * QUERIES);
            }
            const int64_t from = first_block * QUERIES;
            gemm_packed<true>(32, int(v_width), int(depth - from), weights + from, TOGETHER,
                              given + from * v_width, int(v_width), to_values + k * v_width,
                              v_width);
            gemm_packed<true>(32, int(width), int(depth - from), to_scores + from, TOGETHER,
                              asked + from * width, int(width), to_keys + k * width, width);
          }
          auto run = k0 ? gemm_packed<true> : gemm_packed<false>;
          for (int64_t h = 0; h < blocks; h++) {
            const int64_t seen = std::min(some, q0 + (h + 1) * QUERIES - k0);
            run(int(width), QUERIES, int(seen), turned_keys + k0, int(row),
                terms + h * KEYS * QUERIES, QUERIES, to_q + h * QUERIES, TOGETHER);
          }
        }
        turn_back(width, TOGETHER, to_q, rows);
        give_back<bf16>(d_q, d_q_shared, here, count, task.head, in.scale, rows, width);
      }
      give_back<bf16>(d_k, d_k_shared, task.first, task.length, task.head, in.scale, to_keys,
                      width);
      give_back<bf16>(d_v, in.none(), task.first, task.length, task.head, 1.f, to_values, v_width);
    }
  }
}

}  // namespace
#else
namespace {

void forward_rounded(const Inputs&, const Part&, float*) {}
void backward_rounded(const Inputs&, const Part&, const float*, const Part&, const Part&,
                      const Part&, const Part&, const Part&, const Part&) {}

}  // namespace
#endif
