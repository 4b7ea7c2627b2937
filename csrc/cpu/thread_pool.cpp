// The threads, their barrier, and the profile of their phases (parallel.h, profile.h).
//
// A barrier is one counter and one generation: the last thread to arrive raises the generation, and the others wait
// for that change. Tried and rejected: a worker that sleeps at once between two steps (50 us to wake it).
#include "recycle/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cores.h"

#if defined(__linux__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace recycle {

namespace {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Iterations of a spin before a thread sleeps. At a barrier ~50 us, longer than any phase of a small model's step.
// Between two calls ~0.5 ms, longer than a caller needs for the tokens of a step; a thread that sleeps costs ~50 us.
constexpr int kBarrierSpin = 2000;
constexpr int kIdleSpin = 20000;

// Waits until `value` differs from `old`: spins for `spin` iterations, then sleeps.
void await_change(const std::atomic<uint32_t>& value, uint32_t old, int spin) {
  for (int i = 0; i < spin; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

// Wakes the threads that sleep in await_change(), after a change of `value`.
void wake(std::atomic<uint32_t>& value) {
  // notify_all() first checks whether a thread sleeps. This check must not be reordered before the change: a thread
  // that goes to sleep in between would see the old value, and never wake.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  value.notify_all();
}

// A mutex that is given to the threads in the order in which they came: a thread that locks it again and again, as a
// prefill does, keeps no other thread out.
class TurnMutex {
 public:
  void lock() {
    const uint32_t turn = next_.fetch_add(1, std::memory_order_relaxed);
    for (uint32_t now; (now = now_.load(std::memory_order_acquire)) != turn;) await_change(now_, now, 0);
  }
  void unlock() {
    now_.fetch_add(1, std::memory_order_release);
    wake(now_);
  }

 private:
  std::atomic<uint32_t> next_{0};
  std::atomic<uint32_t> now_{0};
};

TurnMutex pool_mutex;  // held by a parallel() from begin to end; guards all that is global here

}  // namespace

// The sums of a profile for one thread.
class ThreadProfile {
 public:
  void start() { last_ = now(); }
  void finish(Phase phase, bool is_module) {
    PhaseTime& time = of(phase, is_module);
    time.work += lap();
    ++time.count;
  }
  void resume(Phase phase, bool is_module) { of(phase, is_module).wait += lap(); }
  PhaseTime& of(Phase phase, bool is_module) { return times_[is_module ? 1 : 0][static_cast<int>(phase)]; }

 private:
  using Clock = std::chrono::steady_clock;
  static Clock::time_point now() { return Clock::now(); }
  double lap() {
    const Clock::time_point before = last_;
    last_ = now();
    return std::chrono::duration<double>(last_ - before).count();
  }

  alignas(64) Clock::time_point last_;
  PhaseTime times_[2][kPhases];
};

class Barrier {
 public:
  void reset(int n_threads, int spin) {
    n_threads_ = n_threads;
    spin_ = spin;
  }

  void arrive_and_wait() {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      wake(generation_);
      return;
    }
    // atomic::wait() may return early.
    while (generation_.load(std::memory_order_acquire) == generation) await_change(generation_, generation, spin_);
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  int n_threads_ = 1;
  int spin_ = 0;
};

namespace {

bool profiling = false;
std::vector<ThreadProfile> thread_profiles;  // one for each thread of the largest team since profile(true)

ThreadProfile* profile_of(int thread) {
  if (!profiling) return nullptr;
  thread_profiles[thread].start();
  return &thread_profiles[thread];
}

}  // namespace

void profile(bool on) {
  const std::lock_guard<TurnMutex> lock(pool_mutex);
  profiling = on;
  thread_profiles.clear();
}

PhaseTime phase_time(Phase phase, bool is_module) {
  const std::lock_guard<TurnMutex> lock(pool_mutex);
  PhaseTime mean;
  const double share = 1.0 / static_cast<double>(thread_profiles.size());
  for (ThreadProfile& thread : thread_profiles) {
    const PhaseTime& time = thread.of(phase, is_module);
    mean.work += time.work * share;
    mean.wait += time.wait * share;
    mean.count = std::max(mean.count, time.count);
  }
  return mean;
}

const char* phase_name(Phase phase) {
  constexpr const char* names[kPhases] = {"leader", "qkv",        "attention", "output", "gate_up",
                                          "down",   "input_proj", "head",      "select"};
  return names[static_cast<int>(phase)];
}

void Team::barrier(Phase phase) const {
  if (profile != nullptr) profile->finish(phase, in_module);
  if (n_threads > 1) sync->arrive_and_wait();
  if (profile != nullptr) profile->resume(phase, in_module);
}

namespace {

class Pool {
 public:
  explicit Pool(int n_threads) : wanted_(n_threads) {
    workers_.reserve(n_threads - 1);
    try {
      for (int thread = 1; thread < n_threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (const std::exception&) {
      // The system starts no more threads (a limit on processes or memory). The started ones suffice.
    }
    n_threads_ = static_cast<int>(workers_.size()) + 1;
    spin_ = n_threads_ <= max_running_threads() ? kBarrierSpin : 0;
    barrier_.reset(n_threads_, spin_);
  }

  ~Pool() {
    stop_ = true;
    start_.fetch_add(1, std::memory_order_release);
    wake(start_);
    for (auto& worker : workers_) worker.join();
  }

  // The number that the last call wanted. A pool that came out smaller stays until a call wants another number.
  int wanted() const { return wanted_; }

  void run(ParallelFunction function, void* context) {
    if (profiling && static_cast<int>(thread_profiles.size()) < n_threads_) thread_profiles.resize(n_threads_);
    function_ = function;
    context_ = context;
    start_.fetch_add(1, std::memory_order_release);
    wake(start_);
    function(Team{0, n_threads_, &barrier_, profile_of(0)}, context);
    barrier_.arrive_and_wait();
  }

 private:
  void work(int thread) {
    run_on_process_cpus();
    int spin = 0;  // spin_ is not set before the first run
    for (uint32_t seen = 0;; ++seen) {
      while (start_.load(std::memory_order_acquire) == seen) await_change(start_, seen, spin);
      if (stop_) return;
      spin = spin_ > 0 ? kIdleSpin : 0;
      function_(Team{thread, n_threads_, &barrier_, profile_of(thread)}, context_);
      barrier_.arrive_and_wait();
    }
  }

  const int wanted_;
  int n_threads_ = 1;
  int spin_ = 0;
  Barrier barrier_;
  alignas(64) std::atomic<uint32_t> start_{0};
  ParallelFunction function_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

Pool* pool = nullptr;

// A forked child lacks the threads of the parent's pool. The child starts a pool of its own, and leaks the parent's:
// joining its threads would never end.
void forget_pool_after_fork() {
  pool = nullptr;
  new (&pool_mutex) TurnMutex;
}

}  // namespace

ParallelPause::ParallelPause() { pool_mutex.lock(); }
ParallelPause::~ParallelPause() { pool_mutex.unlock(); }

void parallel(int n_threads, ParallelFunction function, void* context) {
#if defined(__linux__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
  (void)registered;
#endif
  const std::lock_guard<TurnMutex> lock(pool_mutex);
  if (pool == nullptr || pool->wanted() != n_threads) {
    delete pool;
    pool = nullptr;
    pool = new Pool(n_threads);
  }
  pool->run(function, context);
}

}  // namespace recycle
