// What Kimi Delta Attention's kernels read and write, and the order in which a task walks through.
//
// One task is one sequence and a few query/key heads with their value heads; it walks its chunks in
// order with everything it needs in this core's cache. No head's numbers depend on how many there
// are in its task, so results do not depend on the number of threads. Letters and derivation:
// docs/kda.md.
//
// Rows are padded with zeros to a multiple of 16 or 32 tokens and channels: a zero key writes
// nothing.
#pragma once

#include <cstdlib>
#include <memory>

#include "vector.h"

namespace {

struct Tensor {  // [batch, time, head, channel], channels contiguous; bf16 or fp32
  void* data;
  int64_t batch, time, head;  // strides, in elements
  int64_t is_bf16;
};

struct Problem {
  int64_t sequences, heads, value_heads, key_dim, value_dim, chunk;
  int64_t num_threads;
  // of each sequence: where it lies, and the number of its first chunk
  const int64_t *batch_of, *start, *length, *first_chunk;
  Tensor q, k, v, log_decay, beta, out;
  const float* memory;  // [sequences, value_heads, K, V]
  float* final_memory;
  // what the backward pass needs, or null: [chunks, value_heads, ...], padded; all but `system` in
  // bf16 where products round
  void *starts, *deltas, *q_on_k;
  float* system;
};

struct Gradients {
  Tensor out;                 // given
  const float* final_memory;  // given
  Tensor q, k, v, log_decay, beta;
  float* memory;
};

// Whether the caches forget what is written of a text before anybody reads it.
bool is_long(const Problem& p) {
  constexpr int64_t LARGE = 1 << 20;  // bytes
  int64_t tokens = 0;
  for (int64_t n = 0; n < p.sequences; n++) tokens += p.length[n];
  return tokens * p.value_heads * p.value_dim * int64_t(sizeof(float)) > LARGE;
}

int64_t filled_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One allocation, cut into pieces that begin on a line. Most are whole pages long: were they not
// set off from each other, a load would wait for stores to the same place in another piece's page.
class Scratch {
 public:
  // With room for what Rooms(scratch, sizes...) takes.
  template <class Rooms, class... Sizes>
  static Scratch for_rooms(Sizes... sizes) {
    Scratch counted;
    Rooms(counted, sizes...);
    const size_t bytes = counted.used_ * sizeof(float);
    counted.data_.reset(static_cast<float*>(aligned_alloc(64, bytes)));
    counted.used_ = 0;
    return counted;
  }

  float* take(size_t floats) {
    float* piece = data_ ? data_.get() + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16 + 80;
    return piece;
  }

 private:
  Scratch() : data_(nullptr, &free) {}

  std::unique_ptr<float, void (*)(void*)> data_;
  size_t used_ = 0;
};

void read_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, float* to) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) widen(static_cast<bf16*>(x.data) + at, n, to);
  else widen(static_cast<float*>(x.data) + at, n, to);
}

// A row that will be read when the next stop's turn comes.
void prefetch_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n) {
  const int64_t size = x.is_bf16 ? 2 : 4, at = b * x.batch + t * x.time + h * x.head;
  prefetch(static_cast<char*>(x.data) + at * size, n * size);
}

void write_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) narrow(from, n, static_cast<bf16*>(x.data) + at);
  else memcpy(static_cast<float*>(x.data) + at, from, n * 4);
}

// Past the caches.
void write_far_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n,
                   const float* from) {
  int64_t at = b * x.batch + t * x.time + h * x.head;
  if (x.is_bf16) copy_past_caches(from, n, static_cast<bf16*>(x.data) + at);
  else copy_past_caches(from, n, static_cast<float*>(x.data) + at);
}

void add_row(const Tensor& x, int64_t b, int64_t t, int64_t h, int64_t n, const float* from) {
  float* to = static_cast<float*>(x.data) + b * x.batch + t * x.time + h * x.head;
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

struct Heads {  // value heads of one task, which walks its chunks with all of them
  int64_t first, end;
};

// One chunk of one head on a task's way.
struct Stop {
  int64_t chunk, batch, start, tokens, head, value_head;

  // Neighbouring heads' rows lie on the same pages of memory: all heads of a chunk, then the next
  // chunk, forward or backward. Behind the last stop is one without tokens.
  Stop(const Problem& p, int64_t sequence, Heads heads, int64_t index, bool is_forward) {
    const int64_t count = heads.end - heads.first, length = p.length[sequence];
    const int64_t chunks = (length + p.chunk - 1) / p.chunk;
    const int64_t at = is_forward ? index / count : chunks - 1 - index / count;
    chunk = p.first_chunk[sequence] + at;
    batch = p.batch_of[sequence];
    start = p.start[sequence] + at * p.chunk;
    const int64_t left = length - at * p.chunk;
    tokens = at < 0 || left < 0 ? 0 : left < p.chunk ? left : p.chunk;
    value_head = heads.first + index % count;
    head = value_head / (p.value_heads / p.heads);
  }
};

// Calls walk(stop, the one after it) for all of a task's chunks and heads.
template <class Walk>
void each_stop(const Problem& p, int64_t sequence, Heads heads, bool is_forward, Walk walk) {
  const auto stop = [&](int64_t index) { return Stop(p, sequence, heads, index, is_forward); };
  const int64_t chunks = (p.length[sequence] + p.chunk - 1) / p.chunk;
  for (int64_t i = 0; i < chunks * (heads.end - heads.first); i++) walk(stop(i), stop(i + 1));
}

// The memories of a task's heads, filled up to V columns and K rows, and back.
void read_memories(const Problem& p, const float* from, int64_t sequence, Heads heads, int V, int K,
                   float* to) {
  memset(to, 0, sizeof(float) * (heads.end - heads.first) * K * V);
  const float* head = from + (sequence * p.value_heads + heads.first) * p.key_dim * p.value_dim;
  for (int64_t hv = heads.first; hv < heads.end; hv++, to += K * V)
    for (int64_t row = 0; row < p.key_dim; row++, head += p.value_dim)
      memcpy(to + row * V, head, p.value_dim * 4);
}

void write_memories(const Problem& p, const float* from, int64_t sequence, Heads heads, int V,
                    int K, float* to) {
  float* head = to + (sequence * p.value_heads + heads.first) * p.key_dim * p.value_dim;
  for (int64_t hv = heads.first; hv < heads.end; hv++, from += K * V)
    for (int64_t row = 0; row < p.key_dim; row++, head += p.value_dim)
      memcpy(head, from + row * V, p.value_dim * 4);
}

// Where a token's gradients go. Value heads of one query/key head add to the same.
class Outputs {
 public:
  Outputs(const Problem& p, const Gradients& d)
      : p_(p), d_(d), group_(p.value_heads / p.heads), is_long_(is_long(p)) {}

  // Of some rows the channels from `first` on, `count` or as many as there are; of each array one
  // row lies behind the other.
  void put_keys(const Stop& stop, int64_t row, int64_t rows, int64_t first, int64_t count,
                const float* q, const float* k, const float* log_decay) const {
    const int64_t n = count < p_.key_dim - first ? count : p_.key_dim - first;
    const auto each = [&](Tensor x, int64_t head, const float* from, auto put) {
      x.data = static_cast<char*>(x.data) + first * (x.is_bf16 ? 2 : 4);
      for (int64_t i = 0; i < rows; i++)
        put(x, stop.batch, stop.start + row + i, head, n, from + i * count);
    };
    const auto each_shared = [&](const Tensor& x, const float* from) {
      if (stop.value_head % group_) each(x, stop.head, from, add_row);
      else if (group_ > 1 || !is_long_) each(x, stop.head, from, write_row);
      else each(x, stop.head, from, write_far_row);
    };
    each_shared(d_.q, q);
    each_shared(d_.k, k);
    if (is_long_) each(d_.log_decay, stop.value_head, log_decay, write_far_row);
    else each(d_.log_decay, stop.value_head, log_decay, write_row);
  }

  void put_values(const Stop& stop, int64_t row, const float* v, float beta) const {
    const auto put_row = is_long_ ? write_far_row : write_row;
    put_row(d_.v, stop.batch, stop.start + row, stop.value_head, p_.value_dim, v);
    write_row(d_.beta, stop.batch, stop.start + row, stop.value_head, 1, &beta);
  }

 private:
  const Problem& p_;
  const Gradients& d_;
  int64_t group_;
  bool is_long_;
};

}  // namespace
