// A plain sum over a buffer, each thread its own part, one stream with the products' loads and prefetches, from
// huge pages where the weights are in such. The median pass counts: what is compared with it is an average
// over a second, and on a shared machine the best pass is a moment that the second hasn't got. The buffer
// should be as large as the model: a cache that holds the model holds the buffer too, and the floor is
// then that cache's.
#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "huge_pages.h"
#include "kernels.h"
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
      kernels().read_stream(pass.buffer.data() + range.begin * 64, (range.end - range.begin) * 64);
}

}  // namespace

double read_bandwidth(int64_t bytes, int repeats) {
  std::vector<float> buffer;
  buffer.reserve(bytes / sizeof(float));
  use_huge_pages(buffer.data(), bytes);
  buffer.resize(bytes / sizeof(float), 1.0f);
  std::vector<double> rates;
  for (int i = 0; i <= std::max(repeats, 1); ++i) {  // the first only warms up
    Pass pass{buffer, 0.0f};
    const auto start = std::chrono::steady_clock::now();
    parallel(read_share, &pass);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i > 0) rates.push_back(static_cast<double>(bytes) / seconds.count());
  }
  const auto middle = rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

}  // namespace recycle
