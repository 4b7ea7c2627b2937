// A plain sum over a buffer, each thread its own part, in as many streams and with the same loads as the
// products read weights, from huge pages where the weights are in such. The best pass counts: a slower one was disturbed. The buffer should be as large
// as the model: a cache that holds the model holds the buffer too, and the floor is then that cache's.
#include "bandwidth.h"

#include <atomic>
#include <chrono>
#include <vector>

#include "huge_pages.h"
#include "isa.h"
#include "recycle/parallel.h"

namespace recycle {

namespace {

struct Pass {
  const std::vector<float>& buffer;
  std::atomic<float> sum;  // so that the reading can't be optimised away
};

void read_share(const Team& team, void* context) {
  auto& pass = *static_cast<Pass*>(context);
  const Range range = team.share(static_cast<int64_t>(pass.buffer.size()) / 64);
  pass.sum =
      kernels().read_streams(pass.buffer.data() + range.begin * 64, (range.end - range.begin) * 64);
}

}  // namespace

double read_bandwidth(int64_t bytes, int repeats) {
  std::vector<float> buffer;
  buffer.reserve(bytes / sizeof(float));
  use_huge_pages(buffer.data(), bytes);
  buffer.resize(bytes / sizeof(float), 1.0f);
  double best = 0;
  for (int i = 0; i <= repeats; ++i) {  // the first only warms up
    Pass pass{buffer, 0.0f};
    const auto start = std::chrono::steady_clock::now();
    parallel(read_share, &pass);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double rate = static_cast<double>(bytes) / seconds.count();
    if (i > 0 && rate > best) best = rate;
  }
  return best;
}

}  // namespace recycle
