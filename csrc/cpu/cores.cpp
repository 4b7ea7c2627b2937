// A quota that is no whole number is rounded down. A thread more than the quota uses it up before its period ends, and
// then all threads stop, within a step, until the next period: with a quota of 1, two threads are slower than one.
#include "cores.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>

#include "control_groups.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#endif

namespace recycle {

namespace {

// The calling thread's affinity mask; empty where the system does not say.
std::vector<int> thread_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
  return cpus;
}

// The CPUs of all of OpenMP's places, ascending; empty without OpenMP or places.
std::vector<int> openmp_cpus() {
  std::set<int> cpus;
#if defined(__linux__)
  // torch brings an OpenMP; this library itself uses none.
  const auto n_places = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_places"));
  const auto size = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_get_place_num_procs"));
  const auto read = reinterpret_cast<void (*)(int, int*)>(dlsym(RTLD_DEFAULT, "omp_get_place_proc_ids"));
  if (n_places == nullptr || size == nullptr || read == nullptr) return {};
  for (int place = 0; place < n_places(); ++place) {
    std::vector<int> ids(size(place));
    read(place, ids.data());
    cpus.insert(ids.begin(), ids.end());
  }
#endif
  return {cpus.begin(), cpus.end()};
}

// Whether OpenMP has bound the calling thread to some of its places. With OMP_PROC_BIND and the like it does so to the
// thread that imports torch, and the threads that this one starts inherit that.
bool is_bound_by_openmp(const std::vector<int>& thread, const std::vector<int>& places) {
  return thread.size() < places.size() && std::includes(places.begin(), places.end(), thread.begin(), thread.end());
}

// The limit of one control group.
double quota_of(const std::string& folder) {
  std::string quota;  // "max" is no number, so 0
  double period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> quota >> period)) {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1: none
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  const double time = std::strtod(quota.c_str(), nullptr);
  return time > 0 && period > 0 ? time / period : std::numeric_limits<double>::infinity();
}

}  // namespace

std::vector<int> process_cpus() {
  std::vector<int> cpus = thread_cpus();
  if (cpus.empty()) {
    cpus.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cpus.begin(), cpus.end(), 0);
  }
  const std::vector<int> places = openmp_cpus();
  return is_bound_by_openmp(cpus, places) ? places : cpus;
}

int available_cores() { return static_cast<int>(process_cpus().size()); }

int physical_cores(const std::vector<int>& cpus, const std::string& root) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    std::string siblings;  // "0,4" or "0-1": the same for all CPUs of a core
    std::ifstream(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list") >>
        siblings;
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
}

double cpu_quota(const std::string& root) {
  double quota = std::numeric_limits<double>::infinity();
  for_each_control_group("cpu", root, [&](const std::string& folder) { quota = std::min(quota, quota_of(folder)); });
  return quota;
}

int max_running_threads() {
  static const double quota = cpu_quota();
  return static_cast<int>(std::max(1.0, std::min<double>(available_cores(), quota)));
}

int default_threads() {
  static std::mutex mutex;
  static std::vector<int> known_cpus;  // those that known_cores was counted for
  static int known_cores = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::vector<int> cpus = process_cpus();
  if (cpus != known_cpus) {
    known_cores = physical_cores(cpus);
    known_cpus = cpus;
  }
  return std::min(known_cores, max_running_threads());
}

void run_on_process_cpus() {
#if defined(__linux__)
  const std::vector<int> places = openmp_cpus();
  if (!is_bound_by_openmp(thread_cpus(), places)) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : places) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#endif
}

}  // namespace recycle
