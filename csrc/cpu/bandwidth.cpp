// A sum over a buffer of float32. Each thread reads its share as one stream, with the loads and prefetches of gemm(),
// and from huge pages, like the weights.
//
// The result is the median pass: decoding is an average over a second, and on a shared machine the best pass is faster
// than any such average. The buffer should be as large as the model: a cache that holds the model then holds the
// buffer too, and the limit is the bandwidth of this cache.
#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "huge_pages.h"
#include "kernels.h"
#include "recycle/parallel.h"

namespace recycle {

double read_bandwidth(int64_t bytes, int repeats, int n_threads) {
  std::vector<float> buffer;
  buffer.reserve(bytes / sizeof(float));
  use_huge_pages(buffer.data(), bytes);
  buffer.resize(bytes / sizeof(float), 1.0f);
  std::atomic<float> sum;  // a use of the reads, which the compiler would remove otherwise
  std::vector<double> rates;
  for (int i = 0; i <= std::max(repeats, 1); ++i) {  // pass 0 only warms up
    const auto start = std::chrono::steady_clock::now();
    parallel(n_threads, [&](const Team& team) {
      const Range share = team.share(static_cast<int64_t>(buffer.size()) / 64);
      sum = kernels().read_stream(buffer.data() + share.begin * 64, (share.end - share.begin) * 64);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i > 0) rates.push_back(static_cast<double>(bytes) / seconds.count());
  }
  const auto middle = rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

}  // namespace recycle
