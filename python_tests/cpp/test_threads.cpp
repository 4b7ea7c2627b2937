// The thread pool: teams, barriers, callers, settings that change meanwhile, forks, the profile.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <string>
#include <thread>

#include "../../csrc/cpu/cores.h"
#include "../../csrc/cpu/kernels.h"
#include "check.h"
#include "recycle/parallel.h"
#include "recycle/profile.h"

using namespace recycle;

namespace {

// A region whose barriers order plain writes: each thread adds what the one before it wrote.
int64_t sum_in_turns(int n_threads, int rounds) {
  std::vector<int64_t> values(n_threads);
  parallel(n_threads, [&](const Team& team) {
    for (int round = 0; round < rounds; ++round) {
      const int64_t before = values[(team.thread + team.n_threads - 1) % team.n_threads];
      team.barrier(Phase::leader);
      values[team.thread] = before + 1;
      team.barrier(Phase::select);
    }
  });
  return values[0];
}

}  // namespace

TEST(shares_of_a_team_are_all_of_it_once) {
  for (int n_threads = 1; n_threads < 9; ++n_threads)
    for (int64_t total = 0; total < 20; ++total) {
      int64_t next = 0;
      for (int thread = 0; thread < n_threads; ++thread) {
        const Range range = split(total, thread, n_threads);
        CHECK(range.begin == next && range.end >= range.begin);
        next = range.end;
      }
      CHECK(next == total);
    }
}

TEST(team_has_the_threads_that_were_asked_for) {
  for (const int n_threads : {1, 2, 3, 7, 2, 1}) {
    std::vector<int> ran(n_threads);
    parallel(n_threads, [&](const Team& team) {
      CHECK(team.n_threads == n_threads && team.is_leader() == (team.thread == 0));
      ++ran[team.thread];
    });
    CHECK(ran == std::vector<int>(n_threads, 1));
  }
}

TEST(barrier_shows_each_thread_what_the_others_wrote) {
  for (const int n_threads : {1, 2, 3, 4}) CHECK(sum_in_turns(n_threads, 200) == 200);
}

TEST(callers_of_several_threads_take_turns) {
  std::vector<std::thread> callers;
  std::atomic<int> inside{0};
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&inside, caller] {
      for (int i = 0; i < 30; ++i) {
        parallel(1 + (i + caller) % 3, [&](const Team& team) {
          if (team.is_leader()) CHECK(++inside == 1);
          team.barrier(Phase::leader);
          if (team.is_leader()) --inside;
        });
      }
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(caller_that_comes_again_and_again_lets_others_in) {
  std::atomic<bool> stop{false}, started{false};
  std::thread greedy([&] {
    while (!stop) {
      parallel(1, [&](const Team&) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
      started = true;
    }
  });
  while (!started) std::this_thread::yield();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) parallel(1, [](const Team&) {});
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(5));
  stop = true;
  greedy.join();
}

TEST(instruction_set_and_profile_do_not_change_within_a_region) {
  std::atomic<bool> stop{false};
  std::thread changes([&] {
    while (!stop) {
      CHECK(force_isa("generic"));
      profile(true);
      phase_time(Phase::leader, false);
      CHECK(force_isa(nullptr));
      profile(false);
    }
  });
  for (int i = 0; i < 100; ++i)
    parallel(2, [](const Team& team) {
      const Kernels* before = &kernels();
      const bool has_profile = team.profile != nullptr;
      for (int phase = 0; phase < 4; ++phase) team.barrier(Phase::leader);
      CHECK(&kernels() == before && (team.profile != nullptr) == has_profile);
    });
  stop = true;
  changes.join();
  CHECK(!force_isa("none such"));
}

TEST(profile_counts_phases) {
  profile(true);
  for (const int n_threads : {1, 3})
    parallel(n_threads, [](const Team& team) {
      Team mine = team;
      mine.barrier(Phase::qkv);
      mine.in_module = true;
      mine.barrier(Phase::head);
    });
  CHECK(phase_time(Phase::qkv, false).count == 2 && phase_time(Phase::qkv, true).count == 0);
  CHECK(phase_time(Phase::head, true).count == 2 && phase_time(Phase::head, true).work >= 0);
  profile(false);
  CHECK(phase_time(Phase::qkv, false).count == 0);
  CHECK(std::string(phase_name(Phase::select)) == "select");
}

TEST(forked_child_has_a_pool_of_its_own) {
  CHECK(sum_in_turns(3, 10) == 10);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) _exit(sum_in_turns(1, 10) == 10 ? 0 : 1);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(sum_in_turns(3, 10) == 10);
}

TEST(limits_of_the_process_leave_at_least_a_thread) {
  CHECK(available_cores() >= 1 && default_threads() >= 1);
  CHECK(default_threads() <= max_running_threads() && max_running_threads() <= available_cores());
  CHECK(physical_cores({0, 1, 2}, "/nowhere") == 3 && std::isinf(cpu_quota("/nowhere")));
}
