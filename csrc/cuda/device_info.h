// The GPUs of this machine.
#pragma once

#include "step.h"

namespace recycle::cuda {

// What decode_step() has to know of GPU `index`; false if there is no such GPU.
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

// Why CUDA refused the last call that it refused.
const char* last_error();

}  // namespace recycle::cuda
