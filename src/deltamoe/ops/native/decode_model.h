// What model/decoder.py hands to decode.cpp: the model, its states and the rows of a step. Every
// field is eight bytes, so that no compiler pads.
#pragma once

#include "matrix.h"

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

// Where one layer's states lie: KDA's in slots, before and after, and an MLA layer's cache in pages
// of some tokens each. A stride is the numbers from one slot or page to the next.
struct LayerState {
  const void* conv;
  void* conv_after;
  const float* memory;
  float* memory_after;
  void *latent, *rope_key;
  int64_t conv_stride, memory_stride, latent_stride, rope_key_stride;
};

// One token of each of `rows` texts. A slot may be the same before and after: then KDA's state
// changes in place. Row b's token s is in page pages[b * max_pages + s / page_tokens].
struct Batch {
  int64_t rows;
  const int64_t *ids, *past;  // past: tokens read before
  const int64_t *slots_before, *slots_after;
  const int64_t* pages;
  int64_t max_pages, page_tokens;
  int64_t* expert_ids;  // [layers, rows, experts_per_token], where experts are chosen; or null
};
