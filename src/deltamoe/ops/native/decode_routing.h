// Which experts a token chooses, as layers/router.py does, and whose choice an expert is.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_model.h"

namespace {

// What the rows chose in one layer: choice b * experts_per_token + slot.
struct Choices {
  std::vector<int64_t> ids;
  std::vector<float> weights;

  void reserve(size_t count) {
    if (ids.size() >= count) return;
    ids.resize(count);
    weights.resize(count);
  }
};
// The same by expert: those chosen, and whose choices they are.
struct Routes {
  const float* weights = nullptr;
  std::vector<int64_t> experts, starts, members, counts;
  std::vector<float> scores;
};

inline void softmax(float* x, int64_t n) {
  const float most = *std::max_element(x, x + n);
  float total = 0.f;
  for (int64_t i = 0; i < n; i++) total += x[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < n; i++) x[i] /= total;
}

// Only the groups whose best two experts together are preferred stay open.
inline void close_groups(const Channel& c, float* preference) {
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

// One token's experts, the best first and ties to the lower index, with their weights; `room` is
// for two numbers an expert.
inline void choose(const Channel& c, const float* logits, float* room, int64_t* ids,
                   float* weights) {
  const int64_t E = c.num_experts, A = c.experts_per_token;
  float *scores = room, *preference = room + E;
  std::copy(logits, logits + E, scores);
  if (c.scoring == BY_SOFTMAX) softmax(scores, E);
  if (c.scoring == BY_SIGMOID)
    for (int64_t e = 0; e < E; e++) scores[e] = 1.f / (1.f + std::exp(-scores[e]));
  for (int64_t e = 0; e < E; e++) preference[e] = scores[e] + (c.bias ? c.bias[e] : 0.f);
  if (c.num_groups > 1) close_groups(c, preference);
  for (int64_t a = 0; a < A; a++) {
    const int64_t best = std::max_element(preference, preference + E) - preference;
    ids[a] = best;
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

inline void group_by_expert(Routes& r, const int64_t* ids, int64_t count, int64_t num_experts) {
  r.counts.assign(num_experts, 0);
  for (int64_t i = 0; i < count; i++) r.counts[ids[i]]++;
  r.experts.clear();
  r.starts.assign(1, 0);
  for (int64_t e = 0; e < num_experts; e++) {
    if (!r.counts[e]) continue;
    r.experts.push_back(e);
    r.starts.push_back(r.starts.back() + r.counts[e]);
    r.counts[e] = r.starts[r.starts.size() - 2];  // from here on: where the next one goes
  }
  r.members.resize(count);
  for (int64_t i = 0; i < count; i++) r.members[r.counts[ids[i]]++] = i;
}

}  // namespace
