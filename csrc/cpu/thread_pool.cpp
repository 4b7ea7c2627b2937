// The threads, their barrier, and the profile of their phases (parallel.h, profile.h).
//
// A barrier is one counter and one generation: the last thread to arrive raises the generation, and the others wait
// for that change. Tried and rejected: a worker that sleeps at once between two steps (50 us to wake it).
#include "recycle/parallel.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
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

std::vector<ThreadProfile> thread_profiles;  // empty: off

ThreadProfile* profile_of(int thread) {
  if (thread >= static_cast<int>(thread_profiles.size())) return nullptr;
  thread_profiles[thread].start();
  return &thread_profiles[thread];
}

}  // namespace

void profile(bool on) {
  thread_profiles.clear();
  if (on) thread_profiles.resize(n_threads());
}

PhaseTime phase_time(Phase phase, bool is_module) {
  PhaseTime mean;
  const double share = 1.0 / static_cast<double>(thread_profiles.size());
  for (ThreadProfile& thread : thread_profiles) {
    const PhaseTime& time = thread.of(phase, is_module);
    mean.work += time.work * share;
    mean.wait += time.wait * share;
    mean.count = time.count;
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
  explicit Pool(int n_threads) : n_threads_(n_threads) {
    spin_ = n_threads <= available_cores() ? kBarrierSpin : 0;
    barrier_.reset(n_threads, spin_);
    for (int thread = 1; thread < n_threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  }

  ~Pool() {
    stop_ = true;
    start_.fetch_add(1, std::memory_order_release);
    wake(start_);
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return n_threads_; }

  void run(ParallelFunction function, void* context) {
    function_ = function;
    context_ = context;
    start_.fetch_add(1, std::memory_order_release);
    wake(start_);
    function(Team{0, n_threads_, &barrier_, profile_of(0)}, context);
    barrier_.arrive_and_wait();
  }

 private:
  void work(int thread) {
    uint32_t seen = 0;
    while (true) {
      while (start_.load(std::memory_order_acquire) == seen) await_change(start_, seen, spin_ > 0 ? kIdleSpin : 0);
      ++seen;
      if (stop_) return;
      function_(Team{thread, n_threads_, &barrier_, profile_of(thread)}, context_);
      barrier_.arrive_and_wait();
    }
  }

  const int n_threads_;
  int spin_ = 0;
  Barrier barrier_;
  alignas(64) std::atomic<uint32_t> start_{0};
  ParallelFunction function_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

std::mutex pool_mutex;
Pool* pool = nullptr;
std::atomic<int> wanted_threads{0};

// A forked child lacks the threads of the parent's pool. The child starts a pool of its own, and leaks the parent's:
// joining its threads would never end.
void forget_pool_after_fork() {
  pool = nullptr;
  new (&pool_mutex) std::mutex;
}

}  // namespace

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned cores = std::thread::hardware_concurrency();
  return cores == 0 ? 1 : static_cast<int>(cores);
}

int n_threads() {
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  return wanted > 0 ? wanted : available_cores() < kMaxThreads ? available_cores() : kMaxThreads;
}

void set_n_threads(int n) { wanted_threads.store(n, std::memory_order_relaxed); }

void parallel(ParallelFunction function, void* context) {
#if defined(__linux__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
  (void)registered;
#endif
  std::lock_guard<std::mutex> lock(pool_mutex);
  const int wanted = n_threads();
  if (pool == nullptr || pool->size() != wanted) {
    delete pool;
    pool = new Pool(wanted);
  }
  pool->run(function, context);
}

}  // namespace recycle
