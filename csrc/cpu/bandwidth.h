// How fast this machine's memory can be read: the floor every figure is held against.
#pragma once

#include <cstdint>

namespace recycle {

// Bytes a second, all threads together, over a buffer of `bytes`: the best of `repeats` passes.
double read_bandwidth(int64_t bytes, int repeats);

}  // namespace recycle
