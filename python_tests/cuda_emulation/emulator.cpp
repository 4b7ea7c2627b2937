// The emulator (emulator.h), in three variants:
//   RECYCLE_EMULATE_RACES   each thread of a block is a fiber of ThreadSanitizer, too (ordering.h)
//   RECYCLE_EMULATE_CHECKS  a read of shared memory that nothing has written (checks.h), and a shuffle that the threads
//                           of a warp call from different places, end the process
//   neither                 for values and, with kernels that are compiled for AddressSanitizer, for bounds
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "checks.h"
#include "ordering.h"

namespace recycle::cuda::emulator {

namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024;
// Teams of threads, which the blocks of a launch take in turns. The next launch takes other teams.
constexpr int kTeamsOfLaunch = kOrders ? 2 : 1;
constexpr int kTeams = kTeamsOfLaunch * 2;

// Of a block, or of a warp.
struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
  Sync syncs[2];
};

struct Warp {
  Barrier barrier, exchange;
  uint32_t values[2][kLanes];
  uintptr_t path;  // of the first thread at the exchange
};

// An atomic variable: `clock` has what was released to it.
struct Atomic {
  Fiber clock;
  Sync sync;
};

struct Thread {
  void* at[5];  // of __builtin_setjmp
  Fiber fiber;
  char* stack = nullptr;
  bool started, done;
  // The thread waits while the phase of this barrier is still `phase`.
  const Barrier* waits_for;
  unsigned phase;
  Sync fence;  // what the thread's last fence releases
  bool has_fenced;
  std::vector<Atomic*> read;  // since the last fence
};

struct Team {
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  Barrier barrier;
};

class Emulator {
 public:
  void run(dim3 grid, int threads, int64_t shared_bytes, bool overlap, void (*call)(const void*), const void* launch,
           const char* name) {
    this->grid = grid;
    n_threads_ = threads;
    overlap_ = overlap;
    call_ = call;
    launch_ = launch;
    name_ = name;
    ++n_launches_;
    std::vector<size_t> blocks(size_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), size_t{0});
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (size_t i = 0; i < blocks.size(); ++i) {
      block = dim3(blocks[i] % grid.x, blocks[i] / grid.x % grid.y, blocks[i] / grid.x / grid.y);
      team_ = &teams_[n_launches_ % 2 * kTeamsOfLaunch + i % kTeamsOfLaunch];
      shared = static_cast<std::byte*>(std::malloc(shared_bytes));
      allocated_.push_back(shared);
      for (int64_t at = 0; at < shared_bytes; ++at) static_cast<volatile std::byte*>(shared)[at] = std::byte{0xFF};
      track_shared(shared, shared_bytes);
      run_block();
    }
  }

  void synchronize() {
    for (Sync& sync : launch_ends_) sync.acquire();
    for (std::byte* memory : allocated_) std::free(memory);
    allocated_.clear();
    atomics_.clear();
  }

  void wait_for_previous() { launch_ends_[(n_launches_ + 1) % 2].acquire(); }

  void block_barrier() { wait(team_->barrier, alive_, true); }

  void warp_barrier() { wait(warp().barrier, warp_size(), true); }

  uint32_t exchange(uint32_t value, int mask) {
    const uintptr_t path = call_path(thread().stack, kStack);
    Warp& warp = this->warp();
    const int lane = current % kLanes;
    const int phase = warp.exchange.phase & 1;
    warp.values[phase][lane] = value;
    if (warp.exchange.arrived == 0)
      warp.path = path;
    else if (warp.path != path)
      fail("a shuffle with a full mask, which other threads of the warp call from another place");
    wait(warp.exchange, warp_size(), false);
    return warp.values[phase][lane ^ mask];
  }

  unsigned atomic_add(unsigned* at, unsigned value) {
    Thread& self = thread();
    auto found = atomics_.find(at);
    if (!self.has_fenced) {
      if (found != atomics_.end()) self.read.push_back(found->second);
      return relaxed_add(at, value);
    }
    if (found == atomics_.end()) found = atomics_.emplace(at, new_atomic()).first;
    Atomic& atomic = *found->second;
    self.read.push_back(&atomic);
    // Releases what was before the fence, and the operation itself, but nothing in between.
    atomic.clock.enter();
    self.fence.acquire();
    const unsigned before = relaxed_add(at, value);
    atomic.sync.release();
    self.fiber.enter();
    return before;
  }

  void fence() {
    Thread& self = thread();
    for (Atomic* atomic : self.read) atomic->sync.acquire();
    self.read.clear();
    self.fence.release();
    self.has_fenced = true;
  }

  [[noreturn]] void fail(const char* what) const {
    std::fprintf(stderr, "EMULATION: %s (block %u %u %u, thread %d) %s\n", what, block.x, block.y, block.z, current,
                 name_);
    std::_Exit(70);
  }

  dim3 grid, block;
  int current = 0;
  std::byte* shared = nullptr;
  std::mt19937 random{1};

 private:
  Thread& thread() { return team_->threads[current]; }
  Warp& warp() { return team_->warps[current / kLanes]; }
  int warp_size() const { return std::min(kLanes, n_threads_ - current / kLanes * kLanes); }

  Atomic* new_atomic() {
    if (atomics_.size() == all_atomics_.size()) all_atomics_.emplace_back().clock.create();
    return &all_atomics_[atomics_.size()];
  }

  void run_block() {
    for (size_t i = team_->threads.size(); i < static_cast<size_t>(n_threads_); ++i) {
      Thread& thread = team_->threads.emplace_back();
      thread.fiber.create();
      thread.stack = static_cast<char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    for (size_t i = team_->warps.size() * kLanes; i < static_cast<size_t>(n_threads_); i += kLanes)
      team_->warps.emplace_back();
    for (Warp& warp : team_->warps) warp.barrier.arrived = warp.exchange.arrived = 0;
    team_->barrier.arrived = 0;
    alive_ = n_threads_;
    order_.resize(n_threads_);
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random);
    for (int i = 0; i < n_threads_; ++i) {
      Thread& thread = team_->threads[i];
      thread.started = thread.done = thread.has_fenced = false;
      thread.waits_for = nullptr;
      thread.read.clear();
    }
    at_ = 0;
    current = order_[0];
    host_ = Fiber::current();
    host_sync_.release();
    if (__builtin_setjmp(home_) == 0) resume();
    host_.enter();
  }

  // __builtin_longjmp: sanitizers intercept longjmp, and swapcontext makes a system call each time.
  __attribute__((noinline)) void resume() {
    Thread& next = thread();
    next.fiber.enter();
    if (next.started) __builtin_longjmp(next.at, 1);
    next.started = true;
    getcontext(&first_);
    first_.uc_stack.ss_sp = next.stack;
    first_.uc_stack.ss_size = kStack;
    first_.uc_link = nullptr;
    makecontext(&first_, &Emulator::enter, 0);
    setcontext(&first_);
  }

  static void enter();

  void run_thread() {
    host_sync_.acquire();
    if (!overlap_) wait_for_previous();
    call_(launch_);
    launch_ends_[n_launches_ % 2].release();
    thread().done = true;
    // A barrier doesn't wait for threads that have returned.
    --alive_;
    Barrier& barrier = team_->barrier;
    if (alive_ > 0 && barrier.arrived == alive_) complete(barrier);
    if (alive_ == 0) __builtin_longjmp(home_, 1);
    next();
    resume();
  }

  static void complete(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.phase;
  }

  // The next thread, in a shuffled order, that doesn't wait.
  void next() {
    for (size_t i = 0; i < order_.size(); ++i) {
      at_ = (at_ + 1) % order_.size();
      const Thread& candidate = team_->threads[order_[at_]];
      if (candidate.done) continue;
      if (candidate.waits_for != nullptr && candidate.waits_for->phase == candidate.phase) continue;
      current = order_[at_];
      return;
    }
    for (const Thread& stuck : team_->threads)
      for (const Warp& warp : team_->warps)
        if (!stuck.done && stuck.waits_for == &warp.exchange)
          fail("a shuffle with a full mask, which other threads of the warp never reach");
    fail("a barrier, which other threads never reach");
  }

  __attribute__((noinline)) void suspend() {
    if (__builtin_setjmp(thread().at) == 0) {
      next();
      resume();
    }
  }

  void wait(Barrier& barrier, int expected, bool orders) {
    Thread& self = thread();
    const unsigned phase = barrier.phase;
    Sync& sync = barrier.syncs[phase % 2];
    if (orders) sync.release();
    if (++barrier.arrived == expected) {
      complete(barrier);
    } else {
      self.waits_for = &barrier;
      self.phase = phase;
      suspend();
      self.waits_for = nullptr;
    }
    if (orders) sync.acquire();
  }

  int n_threads_ = 0;
  bool overlap_ = false;
  void (*call_)(const void*) = nullptr;
  const void* launch_ = nullptr;
  const char* name_ = "";
  unsigned n_launches_ = 0;
  Team teams_[kTeams];
  Team* team_ = nullptr;
  std::vector<int> order_;  // of the threads
  size_t at_ = 0;           // in order_
  int alive_ = 0;
  void* home_[5];
  ucontext_t first_;  // of a thread that starts
  Fiber host_;
  Sync host_sync_, launch_ends_[2];
  std::vector<std::byte*> allocated_;
  std::map<unsigned*, Atomic*> atomics_;
  std::deque<Atomic> all_atomics_;
};

Emulator emulator;

void Emulator::enter() { emulator.run_thread(); }

}  // namespace

void shuffle_with(unsigned seed) { emulator.random.seed(seed); }
void run(dim3 grid, int threads, int64_t shared_bytes, bool overlap, void (*call)(const void*), const void* launch,
         const char* name) {
  emulator.run(grid, threads, shared_bytes, overlap, call, launch, name);
}
void synchronize() { emulator.synchronize(); }
int thread_index() { return emulator.current; }
dim3 block_index() { return emulator.block; }
dim3 grid_size() { return emulator.grid; }
void* shared_memory() { return emulator.shared; }
void wait_for_previous() { emulator.wait_for_previous(); }
void block_barrier() { emulator.block_barrier(); }
void warp_barrier() { emulator.warp_barrier(); }
uint32_t exchange(uint32_t value, int mask) { return emulator.exchange(value, mask); }
unsigned atomic_add(unsigned* at, unsigned value) {
  check_atomic(at, __builtin_return_address(0));
  return emulator.atomic_add(at, value);
}
void fence() { emulator.fence(); }

}  // namespace recycle::cuda::emulator
