// Threads that share one piece of work after another, with barriers in between.
//
// OpenMP's threads either spin for good or sleep at the end of each region, as the process was
// told at its start (docs/decisions/0010). A token's step is too short to be woken up for, and
// what lies between two steps is shorter still: these threads wait awake for a little while, let
// others run for a little longer, and only then sleep.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Waiting for another thread: a pause of the processor at first, then whoever else wants to run.
class Patience {
 public:
  void wait() {
    if (spins_++ < 400) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      sched_yield();
    }
  }

 private:
  int spins_ = 0;
};

class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  ~Team() {
    assign(STOP);
    for (std::thread& worker : workers_) worker.join();
  }

  // work(i) for i from 0 to `threads` - 1, each in a thread of its own; 0 is the caller.
  void run(int threads, const std::function<void(int)>& work) {
    while (int(workers_.size()) + 1 < threads) {
      const int me = int(workers_.size()) + 1;
      workers_.emplace_back([this, me, seen = task_.load()] { serve(me, seen); });
    }
    work_ = &work;
    unfinished_.store(threads - 1, std::memory_order_relaxed);
    if (threads > 1) assign(threads);
    work(0);
    for (Patience p; unfinished_.load(std::memory_order_acquire);) p.wait();
  }

  // Within `work`: wait until all threads have come here.
  void meet(int threads) {
    if (threads == 1) return;
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (Patience p; turn_.load(std::memory_order_acquire) == turn;) p.wait();
  }

 private:
  static constexpr int64_t STOP = 0, NUMBER = 1 << 16;
  static constexpr std::chrono::milliseconds AWAKE{2};

  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable bell_;
  int asleep_ = 0;
  // The task's number times NUMBER, plus how many threads take part.
  alignas(64) std::atomic<int64_t> task_{NUMBER - 1};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};

  void assign(int64_t threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    task_.store((task_.load() / NUMBER + 1) * NUMBER + threads, std::memory_order_release);
    if (asleep_) bell_.notify_all();
  }

  void serve(int me, int64_t seen) {
    for (;;) {
      seen = next(seen);
      const int64_t threads = seen % NUMBER;
      if (threads == STOP) return;
      if (me >= threads) continue;
      (*work_)(me);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  int64_t next(int64_t seen) {
    const auto start = std::chrono::steady_clock::now();
    Patience p;
    for (int turns = 0;; turns++) {
      const int64_t task = task_.load(std::memory_order_acquire);
      if (task != seen) return task;
      if (turns % 64 == 63 && std::chrono::steady_clock::now() - start > AWAKE) break;
      p.wait();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_++;
    bell_.wait(lock, [&] { return task_.load() != seen; });
    asleep_--;
    return task_.load();
  }
};
