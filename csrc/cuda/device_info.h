// What the backend knows of the machine's GPUs.
#pragma once

#include <cstdint>

namespace recycle::cuda {

struct Device {
  int multiprocessors = 1;
  bool overlap = false;              // programmatic dependent launch works (sm_90 and later)
  int64_t shared_bytes = 48 * 1024;  // maximum of shared memory for a block
};

// The properties of GPU `index`, queried once a process; false if there is no such GPU.
bool describe(int index, Device* device);

// Makes a GPU the current one until the end of the scope.
class OnGpu {
 public:
  explicit OnGpu(int index);
  ~OnGpu();
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

 private:
  int before_ = -1;
};

// CUDA's message for the last call that failed.
const char* last_error();

}  // namespace recycle::cuda
