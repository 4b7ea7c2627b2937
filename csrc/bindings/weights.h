// What bindings of recycle_ext._C share, and those of packed weights.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "recycle/parallel.h"

namespace recycle::bindings {

struct Buffer {
  explicit Buffer(const pybind11::buffer& buffer, bool writable) : info(buffer.request(writable)) {
    bytes = info.size * info.itemsize;
  }
  pybind11::buffer_info info;
  int64_t bytes;
};

inline int check_n_threads(int n) {
  if (n < 1 || n > kMaxThreads)
    throw std::invalid_argument("threads is " + std::to_string(n) + "; it must be 1 to " + std::to_string(kMaxThreads));
  return n;
}

// Formats, packing and loading.
void bind_weights(pybind11::module_& m);

}  // namespace recycle::bindings
