// One parallel region a step: every thread of the team runs the same function from start to end and
// meets the others at barriers.
//
// What bounds it: a step of a 30-layer model has ~180 barriers, so a barrier must cost a fraction of a
// microsecond. Threads therefore spin (bounded) before they sleep. With more threads than cores they
// sleep at once: a spinning thread would only keep the one it waits for from running.
#pragma once

#include <cstdint>

#include "recycle/profile.h"

namespace recycle {

class Barrier;
class ThreadProfile;

struct Range {
  int64_t begin;
  int64_t end;
};

// The share of `thread` when `total` items are split into contiguous, nearly equal parts.
inline Range split(int64_t total, int thread, int n_threads) {
  return {total * thread / n_threads, total * (thread + 1) / n_threads};
}

struct Team {
  int thread;
  int n_threads;
  Barrier* sync;
  ThreadProfile* times = nullptr;  // null unless a profile is on
  bool in_module = false;          // for the profile only

  Range share(int64_t total) const { return split(total, thread, n_threads); }
  // All threads have finished what stands before it, and see each other's writes, after it. `phase` says
  // what stands before it.
  void barrier(Phase phase) const;
};

using ParallelFunction = void (*)(const Team& team, void* context);

// Runs `function` on n_threads() threads, the caller being one of them; returns when all are done.
// Calls from several threads of a process run one after the other.
void parallel(ParallelFunction function, void* context);

int n_threads();
// Takes effect at the next parallel(); 1 <= n <= kMaxThreads.
void set_n_threads(int n);
// Cores this process may run on (its affinity mask).
int available_cores();

inline constexpr int kMaxThreads = 256;

}  // namespace recycle
