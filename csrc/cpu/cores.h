// The CPUs of this process, and how many threads are worth starting on them.
#pragma once

#include <string>
#include <vector>

namespace recycle {

// CPUs that this process may run on.
std::vector<int> process_cpus();
int available_cores();

// The cores among `cpus`: two hyperthreads of a core count once. root: where /sys is, for tests.
int physical_cores(const std::vector<int>& cpus, const std::string& root = "");

// CPUs' worth of time that the process's control groups (version 1 or 2) allow it; infinite without a limit.
// root: where /proc and /sys are, for tests.
double cpu_quota(const std::string& root = "");

// Threads that can run at the same time: available_cores(), at most cpu_quota().
int max_running_threads();

// The default number of threads: one for each physical core, at most max_running_threads(). A second hyperthread of a
// core adds nothing to a step, which memory bounds.
int default_threads();

// Lets the calling thread run on all CPUs of the process, where OpenMP has bound the thread that started it to one.
void run_on_process_cpus();

}  // namespace recycle
