// One parallel region a step: every thread of the team runs the same function from start to end, and the
// threads wait for each other at barriers.
//
// What bounds it: a step of a 30-layer model has about 180 barriers, so a barrier must cost a fraction of a
// microsecond. Threads therefore spin (bounded) before they sleep. With more threads than cores they sleep
// at once, because a spinning thread would only hold up the thread that it waits for.
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

// What a thread knows of its team.
struct Team {
  int thread;  // its rank; rank 0 is the caller of parallel() and decides between passes
  int n_threads;
  Barrier* sync;
  ThreadProfile* profile = nullptr;  // null unless a profile is on
  bool in_module = false;            // for the profile only

  bool is_leader() const { return thread == 0; }
  Range share(int64_t total) const { return split(total, thread, n_threads); }
  // Returns once all threads have called it; each then sees what the others wrote. `phase` names the work
  // that ends here.
  void barrier(Phase phase) const;
};

using ParallelFunction = void (*)(const Team& team, void* context);

inline constexpr int kMaxThreads = 256;

// Runs `function` on n_threads threads (1 to kMaxThreads), of which the caller is one; returns when all are done. The
// team is smaller where the system does not start as many threads.
// Calls from several threads of a process run one after the other, in the order in which they came.
void parallel(int n_threads, ParallelFunction function, void* context);

// The same for a lambda: body(team).
template <class Body>
void parallel(int n_threads, const Body& body) {
  parallel(
      n_threads, [](const Team& team, void* context) { (*static_cast<const Body*>(context))(team); },
      const_cast<Body*>(&body));
}

// While one of these lives, no parallel() runs. A thread that is in parallel() must not make one.
class ParallelPause {
 public:
  ParallelPause();
  ~ParallelPause();
  ParallelPause(const ParallelPause&) = delete;
  ParallelPause& operator=(const ParallelPause&) = delete;
};

}  // namespace recycle
