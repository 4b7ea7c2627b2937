// How fast this machine reads memory: the limit that the speed of decoding is compared with.
#pragma once

#include <cstdint>

namespace recycle {

// Bytes a second, `n_threads` threads together, over a buffer of `bytes`: the median of `repeats` passes.
double read_bandwidth(int64_t bytes, int repeats, int n_threads);

}  // namespace recycle
