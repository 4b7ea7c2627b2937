#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "../cpu/cores.h"
#include "recycle/parallel.h"

namespace recycle::bindings {

namespace {

std::atomic<int> chosen{0};

}  // namespace

int n_threads() {
  const int n = chosen.load(std::memory_order_relaxed);
  if (n > 0) return n;
  return std::clamp(std::min(default_threads(), static_cast<int>(torch::stable::get_num_threads())), 1, kMaxThreads);
}

void set_n_threads(int n) { chosen.store(n, std::memory_order_relaxed); }

}  // namespace recycle::bindings
