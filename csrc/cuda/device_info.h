// What the backend knows of the machine's GPUs.
#pragma once

#include <cstdint>

namespace recycle::cuda {

struct Device {
  int multiprocessors = 1;
  bool overlap = false;  // programmatic dependent launch works (sm_90 and later), and RECYCLE_CUDA_OVERLAP is not 0
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

// False if the driver is older than the CUDA runtime of this library, which then sees no GPU. Versions as CUDA counts
// them: 1000 * major + 10 * minor.
bool driver_is_new_enough(int* driver, int* runtime);

// CUDA's message for the last call that failed.
const char* last_error();

}  // namespace recycle::cuda
