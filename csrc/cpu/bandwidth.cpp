// A plain sum over a buffer, each thread its own contiguous part, the way the weights are read. The best
// pass counts: a slower one was disturbed. The buffer should be as large as the model: a cache that
// holds the model holds the buffer too, and the floor is then that cache's.
#include "bandwidth.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "recycle/parallel.h"

namespace recycle {

namespace {

struct Pass {
  const std::vector<uint64_t>& buffer;
  std::atomic<uint64_t> sum;
};

void read_share(const Team& team, void* context) {
  auto& pass = *static_cast<Pass*>(context);
  const Range range = team.share(static_cast<int64_t>(pass.buffer.size()) / 16);
  uint64_t lanes[16] = {};
  for (int64_t i = range.begin; i < range.end; ++i)
    for (int lane = 0; lane < 16; ++lane) lanes[lane] += pass.buffer[i * 16 + lane];
  for (const uint64_t lane : lanes) pass.sum += lane;
}

}  // namespace

double read_bandwidth(int64_t bytes, int repeats) {
  const std::vector<uint64_t> buffer(bytes / sizeof(uint64_t), 1);
  double best = 0;
  for (int i = 0; i <= repeats; ++i) {  // the first only warms up
    Pass pass{buffer, {0}};
    const auto start = std::chrono::steady_clock::now();
    parallel(read_share, &pass);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i > 0 && static_cast<double>(bytes) / seconds.count() > best)
      best = static_cast<double>(bytes) / seconds.count();
  }
  return best;
}

}  // namespace recycle
